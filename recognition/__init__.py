"""Face-recognition training at any number of identities."""

__version__ = "0.1.0"
