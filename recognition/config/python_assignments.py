"""Keys that a Python file assigns to its `config`, followed through the source without running it."""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from recognition.errors import UserError

_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_LARGEST_EXPONENT = 64
_NUMBER = (int, float)


@dataclass(frozen=True)
class Function:
    """A lambda or a function of a configuration, which is not run."""


@dataclass(frozen=True)
class Value:
    """A value that a configuration assigns."""

    value: Any
    place: str
    """File and line, for messages."""


def read_config(path: Path) -> dict[str, Value]:
    """Return the keys of a file's `config`: of `config.key = value`, `config["key"] = value` and `config = edict(...)`.

    Values are numbers, texts, tuples (of lists too), dictionaries, None and `Function`. Raises UserError, which names
    file and line, where the file is not Python, assigns nothing, or has a value that cannot be read without running it.
    """
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}:1: not Python: {error}") from None
    reader = _Reader(path)
    for statement in tree.body:
        reader.read(statement)
    if not reader.config:
        raise UserError(f"{path}:1: no assignment such as config.network = ...; not arcface_torch's configuration")
    return reader.config


class _Reader:
    """Statements of one file, each followed without running it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Value] = {}
        self.names: dict[str, Any] = {}

    def read(self, statement: ast.stmt) -> None:
        """Follow one statement. Raises UserError for those that do more than assign."""
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.FunctionDef(name=name):
                self.names[name] = Function()
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value)
            case ast.AugAssign(target=target, op=op, value=value):
                # Whatever is assigned to can be read: the same node with the other context.
                self._assign(target, ast.copy_location(ast.BinOp(target, op, value), statement))
            case _:
                raise self._error(statement, "only assignments can be converted; write the values themselves")

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name) and target.id == "config":
            self.config = self._new_config(value)
        elif (key := self._key(target)) is not None:
            self.config[key] = Value(self._evaluate(value), f"{self.path}:{target.lineno}")
        elif isinstance(target, ast.Name):
            self.names[target.id] = self._evaluate(value)
        else:
            raise self._error(target, f"cannot follow {ast.unparse(target)}; write config.key = value")

    def _new_config(self, value: ast.expr) -> dict[str, Value]:
        """Return the keys of `edict()`, `edict(dict(...))`, `edict({...})`, `edict(key=...)` or `{...}`."""
        match value:
            case ast.Call(func=kind, args=[inner], keywords=[]) if _is_dictionary(kind):
                return self._new_config(inner)
            case ast.Call(func=kind, args=[], keywords=keywords) if _is_dictionary(kind) and all(
                each.arg for each in keywords
            ):
                pairs = [(str(each.arg), each.value) for each in keywords]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                pairs = [(str(self._evaluate(key)), each) for key, each in zip(keys, values, strict=True) if key]
            case _:
                raise self._error(value, f"cannot follow config = {ast.unparse(value)}; write config = edict()")
        return {key: Value(self._evaluate(each), f"{self.path}:{each.lineno}") for key, each in pairs}

    def _key(self, node: ast.expr) -> str | None:
        """Return the key of `config.key` or `config["key"]`; None for anything else."""
        match node:
            case ast.Attribute(value=ast.Name(id="config"), attr=key):
                return key
            case ast.Subscript(value=ast.Name(id="config"), slice=ast.Constant(value=str() as key)):
                return key
        return None

    def _evaluate(self, node: ast.expr) -> Any:
        try:
            return self._value(node)
        except (ArithmeticError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise self._error(node, f"cannot compute {ast.unparse(node)}: {error}") from None

    def _value(self, node: ast.expr) -> Any:
        if (key := self._key(node)) is not None:
            if key not in self.config:
                raise self._error(node, f"config.{key} is read before it has a value")
            return self.config[key].value
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return value
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self._value(key): self._value(each) for key, each in zip(keys, values, strict=True) if key}
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Lambda():
                return Function()
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
                return _OPERATIONS[type(op)](self._value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
                return self._binary(op, self._value(left), self._value(right))
            case ast.Call(func=ast.Name(id="int" | "float" as name), args=[item], keywords=[]):
                return {"int": int, "float": float}[name](self._value(item))
            case ast.Call(func=function, args=parts, keywords=[]) if ast.unparse(function) in (
                "os.path.join",
                "osp.join",
            ):
                return str(PurePosixPath(*(self._value(part) for part in parts)))
        raise self._error(node, f"cannot read {ast.unparse(node)} without running it; write the value itself")

    def _binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        texts = isinstance(left, str) and isinstance(right, str) and isinstance(op, ast.Add)
        if not texts and not (isinstance(left, _NUMBER) and isinstance(right, _NUMBER)):
            raise TypeError("only numbers can be computed with, and texts joined by +")
        if isinstance(op, ast.Pow) and max(abs(left), abs(right)) > _LARGEST_EXPONENT:
            raise ValueError(f"base and exponent must be within {_LARGEST_EXPONENT}")
        return _OPERATIONS[type(op)](left, right)

    def _error(self, node: ast.AST, message: str) -> UserError:
        return UserError(f"{self.path}:{getattr(node, 'lineno', 1)}: {message}")


def _is_dictionary(function: ast.expr) -> bool:
    """Return whether a call makes a dictionary: `dict`, `edict` or `easydict.EasyDict`."""
    return ast.unparse(function).rpartition(".")[2] in ("dict", "edict", "EasyDict")
