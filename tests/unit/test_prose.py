"""Docstrings of the package: a function's begins with an imperative verb, a value's or a class's with a noun phrase.

Words are judged by their form, as no list of verbs would ever be complete: a noun that looks like a verb passes.
"""

import ast
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "recognition"
FILES = sorted(PACKAGE.rglob("*.py"))

# Openings that nothing may have: their sentence is a fragment, or its subject comes too late.
FRAGMENTS = {"what", "of", "likewise", "as", "whoever", "how", "where", "which", "why", "by"}
SAME = ("the same as", "the same,", "the same.", "the former", "the latter", "see above", "as above")
# Words that begin the description of a thing, not of an action.
NOUNS = {
    "whether",
    *("a", "an", "the", "this", "these", "that", "its", "it", "their", "there", "each", "every", "all", "any", "no"),
    *("one", "two", "three", "many", "some", "several", "both", "none", "true", "false", "not", "for", "from", "to"),
    *("in", "on", "at", "with", "if", "when", "after", "before", "between", "whose", "they", "them", "us", "our"),
}
# Verbs that end as the third person or a plural does.
VERBS_IN_S = {"pass", "process", "compress", "suppress", "address", "express", "discuss", "press", "guess", "miss"}
VERBS_IN_ED_OR_ING = {"embed", "feed", "need", "seed", "shed", "speed", "bring", "ring", "string"}


@functools.cache
def docstrings() -> list[tuple[str, str, bool]]:
    """List place, text and whether it describes a function, for each docstring of the package."""
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"
                acts = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_value(node)
                if text:
                    found.append((place, text, acts))
                found += [(f"{path.relative_to(PACKAGE.parent)}:{line}", text, False) for line, text in values(node)]
    return found


def is_value(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a function is read as a value: a property."""
    names = [each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in node.decorator_list]
    return any(name.endswith("property") for name in names)


def values(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of the strings that follow assignments in a class or a module."""
    body = node.body if isinstance(node, ast.ClassDef | ast.Module) else []
    for before, after in itertools.pairwise(body):
        match before, after:
            case ast.Assign() | ast.AnnAssign(), ast.Expr(value=ast.Constant(value=str(text))):
                yield after.lineno, text


def opens_badly(text: str) -> bool:
    """Tell whether a docstring begins with a fragment."""
    return text.split(None, 1)[0].strip(",.:;").lower() in FRAGMENTS or text.lower().startswith(SAME)


def begins_with_a_verb(text: str) -> bool:
    """Tell whether the first word may be an imperative."""
    word = text.split(None, 1)[0].rstrip(",.:;")
    lower = word.lower()
    if not word.isalpha() or not word[0].isupper() or lower in NOUNS:
        return False
    if lower.endswith("s") and lower not in VERBS_IN_S:
        return False
    return lower in VERBS_IN_ED_OR_ING or not lower.endswith(("ed", "ing", "ion", "ness", "ity"))


def test_the_check_knows_good_from_bad() -> None:
    good = ("Return the sum.", "Seed the generator.", "Pass it on.", "Embed images.", "Tell whether it is there.")
    assert all(begins_with_a_verb(text) and not opens_badly(text) for text in good)
    nouns = ("The sum.", "Returns the sum.", "Numbers in 0..1.", "A mean.", "float32 [n].", "`x` moved.", "Selection.")
    assert not any(begins_with_a_verb(text) for text in nouns)
    bad = ("What it is.", "Of a step.", "Likewise.", "As torch's.", "The same as above.", "By torch.")
    assert all(opens_badly(text) for text in bad)
    assert len(docstrings()) > 900


@pytest.mark.parametrize("room", sorted({path.relative_to(PACKAGE).parts[0] for path in FILES}))
def test_docstrings_begin_well(room: str) -> None:
    found = [each for each in docstrings() if Path(each[0].split(":")[0]).parts[1] == room]
    bad = [f"{place}: {text.splitlines()[0]}" for place, text, _ in found if opens_badly(text)]
    bad += [f"{place}: {text.splitlines()[0]}" for place, text, acts in found if acts and not begins_with_a_verb(text)]
    assert not bad, "\n".join(["docstrings that begin with no verb (functions) or with a fragment:", *sorted(set(bad))])
