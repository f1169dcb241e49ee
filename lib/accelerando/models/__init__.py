"""Models of our own, one a module; each saves and loads like any Hugging Face model. Import the module you need."""
