"""Saved models and runs, opened again."""
