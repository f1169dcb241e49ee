"""Models, one per module; each saves and loads like any Hugging Face model. Import the module you need."""
