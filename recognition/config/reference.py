"""The reference of all settings, written from their types, defaults and descriptions.

`python -m recognition.config.reference` prints it as Markdown.
"""

import difflib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from recognition.config import renamed, toml
from recognition.config.base import Section
from recognition.config.sections import Config
from recognition.errors import UserError

_HEAD = """# Settings

`make docs` writes this file from the descriptions in `recognition/config/`.

A run is described by a TOML file: sections `[name]`, below them `key = value`, one a line; text in quotes, `true` and
`false` in small letters. A setting that is left out has its default; only `data.path` is always required. An optional
section, such as `[faces]` or `[head.filter]`, is on when it is written.

- **Overrides.** `python train.py my.toml optimizer.lr=0.05 head.loss.name=cosface` sets single keys for one run.
- **`extends = "other.toml"`**, above all sections, takes over the settings of another file. Its path is relative to
  this one; if there is no such file, the recipe of that name is taken (`recognition recipes` lists them). Settings of
  the file itself win. Another `name` for a loss or an optimizer drops the other file's settings of that section.
- **Old names.** A setting that was renamed is refused, and the error gives its present name. The settings that earlier
  runs stored are still read.
- **Mistakes** are reported all at once, each with its key: unknown keys, wrong types, values that do not go together.
- **arcface_torch.** `recognition/config/arcface_torch.py` converts its Python configurations.
"""
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "value"}


def describe(key: str) -> str:
    """Return the type, default and meaning of a setting, or a section with its settings.

    `key`: `section.key` or a section's name; in a loss or an optimizer, the keys of every variant. Raises UserError for
    an unknown key, with one that is much like it.
    """
    parts = key.strip().strip(".").split(".")
    found = [_describe_names(parts[:-1])] if parts[-1] == "name" and _is_variant(".".join(parts[:-1])) else []
    found = found or list(_found(parts))
    if found:
        return "\n\n".join(found)
    if (said := renamed.advice(".".join(parts))) is not None:
        raise UserError(f"{key} {said}")
    near = difflib.get_close_matches(".".join(parts), [*_section_names(), *keys()], n=1, cutoff=0.5)
    raise UserError(f"{key}: no setting; {f'did you mean {near[0]}?' if near else 'docs/settings.md has all'}")


def keys() -> list[str]:
    """Return the key of every setting, those of all variants too, each once."""
    return list(dict.fromkeys(f"{path}.{name}" for path, model in _sections() for name, _ in _settings(model)))


def markdown() -> str:
    """Return the reference as Markdown: a table of key, type, default and meaning for each section."""
    parts = [_HEAD]
    above = level = ""
    for path, model in _sections():
        if path != above:
            level, above = "#" * (2 + path.count(".")), path
            parts.append(f"{level} `[{path}]`\n")
            parts += [f"{intro}\n"] if (intro := _introduction(path)) else []
        variant = _is_variant(path)
        if variant:
            name = model.model_fields["name"].default
            parts.append(f"{level}# `name = {json.dumps(name)}`\n")
        parts.append(f"{_text(inspect.getdoc(model))}\n")
        rows = [(name, field) for name, field in _settings(model) if not (variant and name == "name")]
        if rows:
            lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
            for name, field in rows:
                cells = (f"`{name}`", _type(field), _default(field), _text(field.description))
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _found(parts: list[str]) -> Iterator[str]:
    """Yield the descriptions of the settings and sections at a key, variants with the same one together."""
    path, last = ".".join(parts), parts[-1]
    names: dict[str, list[str]] = {}
    for section, model in _sections():
        name = model.model_fields["name"].default if _is_variant(section) else ""
        settings = dict(_settings(model))
        if section == path:
            lines = [f"[{section}] {_text(inspect.getdoc(model))}"]
            lines += [f"  {_line(each, field)}" for each, field in settings.items() if not (name and each == "name")]
            names.setdefault("\n".join(lines), []).append(name)
        elif section == ".".join(parts[:-1]) and last in settings:
            names.setdefault(f"{section}.{_line(last, settings[last])}", []).append(name)
    for text, variants in names.items():
        yield f"{text}\n  with name = {', '.join(variants)}" if all(variants) else text


def _describe_names(section: list[str]) -> str:
    """Return a line on the `name` of a section of variants."""
    path = ".".join(section)
    names = [model.model_fields["name"].default for model in toml.models_at(section, Config)]
    return f"{path}.name: one of {', '.join(names)}. {_introduction(path)}".replace("`", "")


def _line(name: str, field: FieldInfo) -> str:
    return f"{name}: {_type(field)}; default: {_default(field)}. {_text(field.description)}".replace("`", "")


def _sections(path: str = "", model: type[Section] = Config) -> Iterator[tuple[str, type[Section]]]:
    """Yield the path and model of each section in the file's order, a section of variants once for each."""
    if path:
        yield path, model
    for name, field in model.model_fields.items():
        inner = f"{path}.{name}" if path else name
        for variant in toml.models_at(inner.split("."), Config):
            assert issubclass(variant, Section), f"{field} is no section"
            yield from _sections(inner, variant)


def _section_names() -> list[str]:
    return list(dict.fromkeys(path for path, _ in _sections()))


def _is_variant(path: str) -> bool:
    return len(toml.models_at(path.split("."), Config)) > 1


def _settings(model: type[Section]) -> list[tuple[str, FieldInfo]]:
    """Return the fields that are settings, not sections."""
    return [(name, field) for name, field in model.model_fields.items() if not toml.models_at([name], model)]


def _introduction(path: str) -> str:
    """Return the line below a section's title: the description of the field that holds it, and its default."""
    *above, name = path.split(".")
    model = toml.models_at(above, Config)[0] if above else Config
    field = model.model_fields[name]
    words = [_text(field.description)] if field.description else []
    if _is_variant(path) and isinstance(field.default, Section):
        words.append(f"Default: `name = {json.dumps(dict(field.default)['name'])}`.")
    elif field.default is None and "efault" not in (field.description or ""):
        words.append("Optional: off unless the section is written.")
    return " ".join(words)


def _text(described: str | None) -> str:
    """Return a docstring as one paragraph that ends in a full stop."""
    text = " ".join((described or "").split())
    return text if not text or text.endswith((".", "?", "!")) else text + "."


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{'{}' if value == {} else json.dumps(value, default=str)}`"


def _type(field: FieldInfo) -> str:
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    """Return a type in words: `positive integer`, `number from 0 to 1`, `one of a, b`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return "one of " + ", ".join(str(each).lower() if isinstance(each, bool) else str(each) for each in arguments)
    if origin in (Union, type(int | None)):
        return " or ".join(_words(each, metadata) for each in arguments if each is not type(None))
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        each = _words(arguments[0], [])
        first, _, rest = each.partition(" or ")[0].partition(" from ")
        number = "list of" if many else {2: "two"}.get(len(arguments), str(len(arguments)))
        return f"{number} {first}s" + (f", each from {rest}" if rest else "")
    if origin is dict:
        return "table of keys and values"
    return _ranged(_WORDS[annotation], _bounds(metadata))


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    """Return the bounds among a type's constraints: gt, ge, lt and le."""
    bounds: dict[str, Any] = {}
    for each in metadata:
        if isinstance(each, FieldInfo):
            bounds |= _bounds(each.metadata)
        elif isinstance(each, annotated_types.Gt | annotated_types.Ge | annotated_types.Lt | annotated_types.Le):
            bounds[type(each).__name__.lower()] = getattr(each, type(each).__name__.lower())
    return bounds


def _ranged(word: str, bounds: dict[str, Any]) -> str:
    if bounds in ({"gt": 0}, {"ge": 1}) and (word == "integer" or "gt" in bounds):
        return f"positive {word}"
    if bounds == {"ge": 0}:
        return f"{word}, 0 or more"
    low = f"from {_number(bounds['ge'])}" if "ge" in bounds else f"above {_number(bounds['gt'])}" if bounds else ""
    high = (
        f"to {_number(bounds['le'])}" if "le" in bounds else f"below {_number(bounds['lt'])}" if "lt" in bounds else ""
    )
    if low and high.startswith("below"):
        return f"{word} {low} to {high}"
    return f"{word} {low} {high}".strip() if high or not low else f"{word} {low} up"


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


if __name__ == "__main__":
    sys.stdout.write(markdown())
