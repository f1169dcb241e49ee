"""What is easy to get wrong in a training script; see README.md."""
