"""Backbones and the embedding neck."""
