"""What a run says as it goes: log, terminal, metrics, progress."""
