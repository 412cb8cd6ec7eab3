"""Blocks of code in the documents, with the files that they are for."""

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"\*\*`([\w./-]+)`\*\*")
_END = "At the end of "


@dataclass(frozen=True)
class Block:
    """A block of code, and the sentence before it that names its file in bold."""

    language: str
    code: str
    file: str
    """The last file that is named in bold before the block; empty where there is none."""
    at_end: bool
    """Whether the code is to be added at the end of the file."""


def blocks(document: Path) -> list[Block]:
    """Read the blocks of a document in order."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        named = list(_FILE.finditer(text, 0, match.start()))
        at_end = bool(named) and text[: named[-1].start()].endswith(_END)
        found.append(Block(match[1], match[2], named[-1][1] if named else "", at_end))
    return found


def commands(document: Path, program: str) -> list[str]:
    """Return the arguments of the commands of `program` that a document gives, each on a line of its own."""
    lines = (line for block in blocks(document) if not block.language for line in block.code.splitlines())
    return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


def carry_out(block: Block, root: Path) -> None:
    """Write, extend or change the block's file below `root`, as a reader of the document would."""
    path = root / block.file
    if block.language == "diff":
        lines = block.code.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{block.file} has {text.count(old)} times\n{old}"
        path.write_text(text.replace(old, new), encoding="utf-8")
    elif block.at_end:
        text = path.read_text(encoding="utf-8").rstrip("\n")
        path.write_text(f"{text}\n\n\n{block.code}", encoding="utf-8")
    else:
        assert not path.exists(), f"{block.file} is there already"
        path.write_text(block.code, encoding="utf-8")
