"""TOML for configurations: overrides of single keys, errors in words, and writing."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel

from recognition.config import renamed
from recognition.config.base import Section
from recognition.files.kinds import what_is

_HINTS = (
    ("nescaped '\\'", "in double quotes a \\ begins a character's code: write / or put the text in single quotes"),
    ("nvalid hex", "in double quotes a \\ begins a character's code: write / or put the text in single quotes"),
    ("after a key in a key/value pair", "a setting is written key = value, one a line"),
    ("overwrite a value", "the key stands here and further above: remove one"),
    ("declare", "the section stands here and further above: put their keys together"),
    ("nvalid value", 'a text needs quotes, as in name = "arcface"; true and false are in small letters'),
    ("nvalid statement", "sections are written [name], settings key = value, comments begin with #"),
)
"""Parts of tomllib's messages, each with advice."""


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file into a tree. Raises ValueError, which names the file, if it is missing or not valid TOML."""
    if path.is_dir():
        inside = sorted(path.glob("*.toml"))
        hint = f", such as {inside[0]}" if inside else ""
        raise ValueError(f"{path}: is a folder; give a file of settings{hint}")
    try:
        # Editors on Windows may begin the file with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{path}: not valid TOML: the file is {what_is(path)}") from None
    try:
        return tomllib.loads(text)
    except ValueError as error:
        kind = what_is(path)
        if kind != "text":
            raise ValueError(f"{path}: not valid TOML: the file is {kind}") from None
        raise ValueError(f"{path}: not valid TOML: {_in_words(str(error), text)}") from None


def _in_words(message: str, text: str) -> str:
    """Return a message of tomllib with the line that it refers to and advice."""
    place = re.search(r"line (\d+)", message)
    lines = text.splitlines()
    number = int(place[1]) if place else len(lines)
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    hint = next((hint for part, hint in _HINTS if part in message), "")
    return "; ".join(part for part in (message, f"the line is: {line}" if line else "", hint) if part)


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Set `section.key=value` overrides in the tree of a configuration whose model is `root`; return the mistakes.

    A value that is not TOML is taken as a string. Some sections come in variants: their field is a union with the
    discriminator `name`. A new `name` drops the fields of the variant that it replaces; a section without a name gets
    the default variant.
    """
    mistakes = []
    names_first = sorted(overrides, key=lambda override: not override.partition("=")[0].strip().endswith(".name"))
    for override in names_first:
        mistake = _apply(tree, override, root)
        if mistake:
            mistakes.append(mistake)
    _name_defaults(tree, root)
    return mistakes


def _apply(tree: dict[str, Any], override: str, root: type[BaseModel]) -> str | None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return f"{override}: an override is written section.key=value"
    try:
        override.encode()
    except UnicodeEncodeError:
        return f"{override!r}: is not text in UTF-8; rename what it names, or link it under another name"
    value = _value(text.strip(), _annotation(keys, root))
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return f"{override}: {'.'.join(keys[:depth])} is a value, not a section"
    if keys[-1] == "name" and len(models_at(keys[:-1], root)) > 1 and tree.get("name") != value:
        tree.clear()
    tree[keys[-1]] = value
    return None


def _value(text: str, annotation: Any) -> Any:
    """Parse the text of an override as TOML; return the text itself if that fails or a path looks like a number."""
    try:
        # In brackets, so that neither a comment nor a second line is lost behind the value.
        values = tomllib.loads(f"value = [{text}]")["value"]
    except tomllib.TOMLDecodeError:
        return text
    if len(values) != 1 or (Path in _parts(annotation) and not isinstance(values[0], str | list)):
        return text
    return values[0]


def _annotation(keys: list[str], root: type[BaseModel]) -> Any:
    """Return the type of the field at the path `keys`; None if there is no such field."""
    fields = (model.model_fields.get(keys[-1]) for model in models_at(keys[:-1], root))
    return next((field.annotation for field in fields if field is not None), None)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield a type and, recursively, its type arguments."""
    yield annotation
    for argument in get_args(annotation):
        yield from _parts(argument)


def _name_defaults(tree: dict[str, Any], model: type[BaseModel]) -> None:
    for key, field in model.model_fields.items():
        table = tree.get(key)
        variants = list(_variants(field.annotation))
        if not isinstance(table, dict) or not variants:
            continue
        if len(variants) == 1:
            _name_defaults(table, variants[0])
        elif field.default is not None:
            table.setdefault("name", field.default.name)


def explain(error: Any, root: type[BaseModel]) -> str:
    """Describe one error of a ValidationError of `root` in words: the key's path, the mistake, and a way out."""
    location = [str(part) for part in error["loc"]]
    path = ".".join(_along(location, root)[0])
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            if (said := renamed.advice(path)) is not None:
                return f"{path} {said}"
            known = [name for model in models_at(location[:-1], root) for name in model.model_fields]
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            return f"{path}: unknown key; {hint}"
        case "missing":
            return f"{path}: missing"
        case "union_tag_invalid":
            return f"{path}.name: {error['ctx']['tag']!r} is none of {error['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return f"{path}.name: missing"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            hint = "; write true or false, in small letters" if value in ("True", "False") else ""
            return f"{path}: {message}, not {json.dumps(value, default=str)}{hint}"


def _variants(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a field with this annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from annotation.variants() if issubclass(annotation, Section) else (annotation,)
    for argument in get_args(annotation):
        yield from _variants(argument)


def _along(location: list[str], root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """Follow an error's location; return its keys in the file, without tags of unions, and the models at its end."""
    keys: list[str] = []
    models: list[type[BaseModel]] = [root]
    for part in location:
        tagged = [
            model for model in models if len(models) > 1 and part in get_args(model.model_fields["name"].annotation)
        ]
        if tagged:
            models = tagged
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [variant for field in fields for variant in _variants(field.annotation)]
        keys.append(part)
    return keys, models


def models_at(keys: list[str], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models that the section at the path `keys` below `root` can have."""
    return _along(keys, root)[1]


def dump(tree: dict[str, Any]) -> str:
    """Return the tree as TOML. Values are strings, numbers, booleans, arrays of them, or tables."""
    return tomli_w.dumps(tree)
