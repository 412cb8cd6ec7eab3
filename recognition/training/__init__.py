"""The training loop and what belongs to its steps."""
