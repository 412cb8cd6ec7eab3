"""Verification sets, the embedder interface and the 10-fold protocol; nothing here imports torch."""
