"""The training loop and what exact resume needs."""
