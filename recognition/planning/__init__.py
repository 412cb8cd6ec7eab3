"""What a run will need, computed before there is any image: memory, time, GPUs."""
