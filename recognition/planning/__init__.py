"""Predictions of a run before there is one: memory, bytes sent, time and GPUs."""
