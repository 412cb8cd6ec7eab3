"""Verification sets and protocols."""
