"""Describe settings; a placeholder until the settings' own reference takes its place."""


def describe(key: str) -> str:
    """Return the meaning, type and default of a setting, or of all of a section."""
    raise NotImplementedError(key)


def markdown() -> str:
    """Return a page of all settings."""
    raise NotImplementedError
