"""Files: written whole or not at all, locked, named and recognised."""
