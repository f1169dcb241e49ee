"""The training loop, with exact resume."""
