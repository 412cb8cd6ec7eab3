"""Files of a run: its folder, its checkpoints, and the weights that another run starts from."""
