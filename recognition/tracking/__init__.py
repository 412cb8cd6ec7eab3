"""Log, metrics and progress of a run, in files and on the terminal."""
