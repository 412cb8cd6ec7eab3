"""Loading of a backbone's weights from state dicts of this and other trainers.

A checkpoint holds its state dict under some key, and the names in it have some prefix. Neither is assumed: every
mapping of tensors in the file is tried with every prefix of its names, and the one that fits the backbone best is
loaded.
"""

import inspect
import itertools
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recognition.errors import UserError
from recognition.files.kinds import what_is
from recognition.models import insightface_weights

_DEPTH = 3
"""Depth to which mappings within mappings are searched."""
_PREFIXES = 32
"""Number of prefixes of a state dict's names that are tried, the most frequent first."""
_MOST_LISTED = 5
_CLASSIFIERS = ("fc", "head", "classifier")
"""Modules that trainers put behind a trunk, besides the one that timm names for the model."""
_SAFETENSORS = "a safetensors file"
_READ = (_SAFETENSORS, "a file of torch.save", "a pickle")
_ADAFACE = "input_layer.0.weight"


@dataclass(frozen=True)
class _Candidate:
    """State dict found in a file, under the backbone's names."""

    place: str
    """Keys and prefix of the state dict within the file, for messages."""
    state: dict[str, Tensor]
    size: int
    """Number of tensors in the mapping that it was found in."""

    def fit(self, own: Mapping[str, Tensor]) -> tuple[int, int]:
        """Count the names that the backbone has, too: with the same shape, and with any shape."""
        shared = [name for name in self.state if name in own]
        return sum(self.state[name].shape == own[name].shape for name in shared), len(shared)

    @property
    def trunk_alone(self) -> bool:
        """True if it has no tensor of the neck."""
        return not any(name.startswith("neck.") for name in self.state)


def read_weights(path: Path) -> Any:
    """Read a file of weights onto the CPU, without unpickling objects.

    Raises UserError if the file is of another kind or damaged.
    """
    kind = what_is(path)
    if path.suffix == ".distcp":
        raise UserError(f"backbone.weights: {path} is one file of a checkpoint: {_instead(path)}")
    if kind == "an ONNX model":
        raise UserError(
            f"backbone.weights: {path} is a model for deployment, which is not trained on: {_instead(path)}"
        )
    if kind not in _READ:
        raise UserError(f"backbone.weights: {path} is no file of weights, but {kind}")
    try:
        if kind == _SAFETENSORS:
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"backbone.weights: {path} needs a package: pip install safetensors") from None
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"backbone.weights: {path} {_reason(error)}") from None


def load_weights(backbone: nn.Module, content: Any, origin: Path | str) -> list[str]:
    """Load the state dict in a file's `content` that fits `backbone`, in place; return notes for the user.

    A state dict of the whole backbone is loaded whole: this package's, or InsightFace's for IResNet and MobileFaceNet.
    One of the trunk alone, as timm's, leaves the neck unchanged and drops the classifier. Tensors that timm's loader
    adapts, such as the position embedding of another image size, are adapted by timm. Raises UserError, with names and
    shapes, if nothing fits; the backbone is not changed then.
    """
    own = backbone.state_dict()
    found = list(_candidates(content))
    if not found:
        raise UserError(f"backbone.weights: {origin} is not a state dict: {_contents(content)}")
    best = max(found, key=lambda candidate: candidate.fit(own))
    if _misfits(best, own):
        near = sorted(found, key=lambda candidate: candidate.fit(own), reverse=True)[:4]
        adapted = [each for each in (_as_timm_adapts(candidate, backbone) for candidate in near) if each is not None]
        best = max([best, *adapted], key=lambda candidate: candidate.fit(own))
    dropped = _after_the_trunk(best, own, backbone)
    best = _Candidate(best.place, {name: best.state[name] for name in best.state if name not in dropped}, best.size)
    if misfits := _misfits(best, own):
        raise UserError(_refusal(origin, content, best, misfits, own))
    for name, tensor in best.state.items():
        if not tensor.isfinite().all():
            raise UserError(f"backbone.weights: {origin}: {name} has numbers that are not finite; take another file")
    backbone.load_state_dict(best.state, strict=False)
    what = "trunk alone, the neck starts anew" if best.trunk_alone else "trunk and neck"
    notes = [f"weights from {origin}{best.place}: {what}"]
    if dropped:
        notes.append(f"weights of the classifier are left out: {_listed(dropped)}")
    if other := best.size - len(best.state) - len(dropped):
        notes.append(f"weights that are not the backbone's are left out: {other} tensor{'s' if other > 1 else ''}")
    return notes


def _candidates(content: Any) -> Iterator[_Candidate]:
    """Yield every state dict that `content` may hold, once as a whole backbone's and once as a trunk's.

    Averaged (EMA) weights come first: they fit as well as the others, and are the better ones.
    """
    for keys, tensors in sorted(_mappings(content), key=lambda item: not any("ema" in key for key in item[0])):
        tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
        for prefix in _prefixes(tensors):
            state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            place = "".join([*(f", {key}" for key in keys), f", names without {prefix!r}" if prefix else ""])
            yield _Candidate(place, insightface_weights.translate(state), len(tensors))
            yield _Candidate(place, {f"trunk.{name}": tensor for name, tensor in state.items()}, len(tensors))


def _mappings(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the mappings of names to tensors within `content`, with the keys that lead to them."""
    if not isinstance(content, Mapping) or len(keys) > _DEPTH:
        return
    tensors = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if tensors:
        yield keys, tensors
    for key, value in content.items():
        yield from _mappings(value, (*keys, str(key)))


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """List the most frequent prefixes of the names, up to a dot; the empty prefix is first."""
    parts = (itertools.accumulate(name.split(".")[:-1], lambda a, b: f"{a}.{b}") for name in names)
    counted = Counter(prefix for each in parts for prefix in itertools.islice(each, _DEPTH))
    return ["", *(f"{prefix}." for prefix, _ in counted.most_common(_PREFIXES))]


def _as_timm_adapts(candidate: _Candidate, backbone: nn.Module) -> _Candidate | None:
    """Adapt a candidate as timm's loader of this model does; return None if timm has nothing to adapt."""
    module = sys.modules[type(backbone.trunk).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None)
    if adapt is None:
        return None
    trunk = {name.removeprefix("trunk."): t for name, t in candidate.state.items() if name.startswith("trunk.")}
    rest = {name: t for name, t in candidate.state.items() if not name.startswith("trunk.")}
    if "norm.weight" not in trunk and "fc_norm.weight" in trunk:  # the same norm, of all positions or of their mean
        trunk = {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in trunk.items()}
    try:
        trunk = adapt(trunk, backbone.trunk) if len(inspect.signature(adapt).parameters) > 1 else adapt(trunk)
    except Exception:  # it assumes a file of its own model
        return None
    adapted = {f"trunk.{name}": tensor for name, tensor in trunk.items()}
    return _Candidate(f"{candidate.place}, adapted by timm", adapted | rest, candidate.size)


def _after_the_trunk(candidate: _Candidate, own: Mapping[str, Tensor], backbone: nn.Module) -> list[str]:
    """List the classifier's tensors in a state dict of a trunk alone."""
    if not candidate.trunk_alone:
        return []
    about = (getattr(backbone.trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    modules = {*_CLASSIFIERS, *((about,) if isinstance(about, str) else about)}
    starts = tuple(f"trunk.{module}." for module in modules)
    return [name for name in candidate.state if name not in own and name.startswith(starts)]


def _misfits(candidate: _Candidate, own: Mapping[str, Tensor]) -> list[str]:
    """Describe how a state dict differs from the backbone's; empty if it fits."""
    state = candidate.state
    wanted = [name for name in own if not (candidate.trunk_alone and name.startswith("neck."))]
    lacking = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    titles = ("it lacks", "it has, unexpectedly,", "of another shape:")
    return [
        f"{title} {_listed(names)}" for title, names in zip(titles, (lacking, unexpected, shapes), strict=True) if names
    ]


def _refusal(origin: Path | str, content: Any, best: _Candidate, misfits: list[str], own: Mapping[str, Tensor]) -> str:
    if not best.fit(own)[1]:
        misfits = [f"it holds {_contents(content)}", f"the backbone has {_listed(list(own))}"]
    lines = [f"backbone.weights: {origin}{best.place} does not fit this backbone", *misfits]
    if any(_ADAFACE in name for _, tensors in _mappings(content) for name in tensors):
        lines.append("its names are those of AdaFace's and TFace's IResNet, for which there is no converter")
    else:
        lines.append("set backbone.name, options, image_size, embedding_size and neck as they were when it was trained")
    return "\n  ".join(lines)


def _contents(content: Any) -> str:
    """Describe a file's content in a few words."""
    if not isinstance(content, Mapping):
        return f"one object of the type {type(content).__name__}; save it with torch.save(model.state_dict(), path)"
    names = [name for _, tensors in _mappings(content) for name in tensors]
    return f"tensors {_listed(names)}" if names else f"keys {_listed([str(key) for key in content]) or 'none'}"


def _reason(error: Exception) -> str:
    """Explain why a file of weights could not be read, and what to do."""
    if isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error):
        return "holds more than tensors; save it anew with torch.save(model.state_dict(), path)"
    lines = str(error).splitlines()
    return f"is damaged, or cut short; fetch it anew ({lines[0] if lines else type(error).__name__})"


def _instead(path: Path) -> str:
    """Tell what to give instead of a file that a run has written."""
    run = next((folder for folder in path.parents if (folder / "config.toml").is_file()), None)
    return f"give the run's folder, {run}" if run else "give the folder of the run that it is from"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
