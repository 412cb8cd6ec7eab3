"""The documents: their links and paths lead somewhere, and their Python runs."""

import re
from pathlib import Path

import pytest
import torch

from recognition import distributed
from tests.support.documents import REPOSITORY, blocks

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
CARRIED_OUT = REPOSITORY / "docs" / "extending.md"
"""Its code is run by tests/integration/test_extending.py, and its files are those that a reader is to make."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?<![\w./-])(?:recognition|tests|docs|configs)/[\w./-]*[\w/]")
OF_OTHERS = {"recognition/arcface_torch"}


def without_blocks(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """The relative links of a document that lead to no file, or to no heading in it."""
    broken = []
    for link in LINK.findall(without_blocks(document)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(document: Path) -> list[str]:
    """The paths in backticks that are not there, nor made by a reader of the document."""
    named = {path for code in CODE.findall(without_blocks(document)) for path in PATH.findall(code)}
    made = {block.file for block in blocks(document)} if document == CARRIED_OUT else set()
    return sorted(
        path
        for path in named - made
        if not (REPOSITORY / path).exists() and not any(path.startswith(other) for other in OF_OTHERS)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    assert broken_links(document) == []
    assert missing_paths(document) == []


def test_what_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A page\n[here](page.md#a-page) [b](page.md#b-page) [c](other.md) [d](https://example.org/d)\n"
        "`recognition/head/losses/base.py` `see recognition/head/losses/bass.py` `docs/no/`\n"
        "```\n[in a block](nowhere.md)\n```\n"
    )
    assert broken_links(document) == ["page.md#b-page", "other.md"]
    assert missing_paths(document) == ["docs/no/", "recognition/head/losses/bass.py"]


def test_the_head_of_the_readme_moves_the_sampled_rows(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in blocks(REPOSITORY / "README.md") if block.language == "python")
    names: dict[str, object] = {}
    try:
        exec(compile(block.code, "README.md", "exec"), names)
    finally:
        distributed.stop()
    embeddings, loss = names["embeddings"], names["loss"]
    assert isinstance(embeddings, torch.Tensor)
    assert isinstance(loss, torch.Tensor)
    assert embeddings.grad is not None
    assert embeddings.grad.norm() > 0
    # Random embeddings are at right angles to all rows: -log of exp(-s m) beside the thousand others, each exp(0).
    assert abs(loss.item() - (64 * 0.4 + torch.tensor(1000.0).log().item())) < 8
    assert capsys.readouterr().out == f"loss {loss.item():.1f}, 1000 rows moved\n"


def test_no_other_document_has_python_that_nothing_runs() -> None:
    others = [path for path in DOCUMENTS if path not in (REPOSITORY / "README.md", CARRIED_OUT)]
    assert not [path for path in others if any(block.language == "python" for block in blocks(path))]
