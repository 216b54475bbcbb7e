"""What is asked of a trained model: one job a file, found by its name."""
