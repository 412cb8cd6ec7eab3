"""TOML for configurations: overrides of single keys, errors in words, and writing."""

import difflib
import json
import tomllib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one override in the tree; returns what is wrong with it, if anything."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        return f"{override}: an override is written section.key=value"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for depth, key in enumerate(keys[:-1], start=1):
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            return f"{override}: {'.'.join(keys[:depth])} is a value, not a section"
    if keys[-1] == "name" and tree.get("name") != value:
        tree.clear()  # another variant: the fields of the one that it replaces do not apply
    tree[keys[-1]] = value
    return None


def explain(error: Any, root: type[BaseModel]) -> str:
    """One line for one of the errors of a ValidationError of `root`: the key's path, what is wrong, and a way out."""
    location = [str(part) for part in error["loc"]]
    section = _sections_along(location, root)
    path = ".".join(part for part, is_tag in section if not is_tag)
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(location[:-1], root)
            near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            return f"{path}: unknown key; {hint}"
        case "missing":
            return f"{path}: missing"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{path}: {message}, not {json.dumps(value, default=str)}"


def _variants(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field's annotation stands for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _variants(argument)


def _sections_along(location: list[str], root: type[BaseModel]) -> list[tuple[str, bool]]:
    """Each part of an error's location, and whether it is a union's tag, which the file does not have."""
    parts: list[tuple[str, bool]] = []
    sections: list[type[BaseModel]] = [root]
    for part in location:
        tagged = [section for section in sections if section.model_fields.get("name") and part in _names(section)]
        if len(sections) > 1 and tagged:
            sections = tagged
            parts.append((part, True))
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [variant for field in fields for variant in _variants(field.annotation)]
        parts.append((part, False))
    return parts


def _names(section: type[BaseModel]) -> tuple[str, ...]:
    return get_args(section.model_fields["name"].annotation)


def _fields_at(location: list[str], root: type[BaseModel]) -> list[str]:
    sections: list[type[BaseModel]] = [root]
    for part, is_tag in _sections_along(location, root):
        if is_tag:
            sections = [section for section in sections if part in _names(section)]
        else:
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [variant for field in fields for variant in _variants(field.annotation)]
    return [name for section in sections for name in section.model_fields]


def dump(tree: dict[str, Any]) -> str:
    """The tree as TOML. Values are strings, numbers, booleans, arrays of them, or tables."""
    lines: list[str] = []
    for path, table in _tables(tree):
        lines += ["", f"[{path}]"] if lines else [f"[{path}]"]
        # JSON's strings, numbers, booleans and arrays of them are TOML too.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _tables(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables of a tree in TOML's order: a table's own values first, then its sub-tables."""
    values = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    if path:
        yield path, values
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tables(value, f"{path}.{key}" if path else key)
