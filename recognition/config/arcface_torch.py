"""Read configurations of arcface_torch; a placeholder until the converter takes its place."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Converted:
    """A configuration of this program, as TOML, and what of the other had no counterpart."""

    toml: str
    notes: list[str] = field(default_factory=list)


def convert_file(path: Path, *, gpus: int) -> Converted:
    """Convert the file at `path`, whose batch is meant for each of `gpus` processes."""
    raise NotImplementedError(f"{path}, {gpus} GPUs")
