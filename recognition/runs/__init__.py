"""What a run leaves on disk: its folder, checkpoints, and the weights that another run starts from."""
