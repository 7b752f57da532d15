"""What a model with its adapter gets right, and what it writes."""
