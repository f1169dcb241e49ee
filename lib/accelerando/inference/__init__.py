"""Loading saved models and runs, and prediction."""
