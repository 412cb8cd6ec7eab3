"""Forecasts of the memory, time and GPUs that a run needs, before any image exists."""
