"""Conversion of arcface_torch's Python configurations to TOML. They are parsed, never run.

Compared with: arcface_torch's train_v2.py, whose behaviour the TOML asks for where there is a setting; every other
difference is a note.
"""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from recognition.config import toml
from recognition.config.python_assignments import Function, Value, read_config
from recognition.config.sections import Config
from recognition.errors import UserError

_BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "embedding_size": 512,
    "sample_rate": 1.0,
    "interclass_filtering_threshold": 0,
    "fp16": False,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "verbose": 2000,
    "frequent": 10,
    "dali": False,
    "dali_aug": False,
    "gradient_acc": 1,
    "seed": 2048,
    "num_workers": 2,
    "output": None,
    "resume": False,
    "save_all_states": False,
}
"""Values of arcface_torch's base.py, for a file that was taken out of its folder."""

_NETWORKS = {
    "r18": "iresnet18",
    "r34": "iresnet34",
    "r50": "iresnet50",
    "r100": "iresnet100",
    "r200": "iresnet200",
    "mbf": "mobilefacenet",
}
# Width, depth, drop path, fraction of the patches that are masked, whether activations are computed again.
_VITS = {
    "vit_t": (256, 12, 0.1, 0.1, False),
    "vit_t_dp005_mask0": (256, 12, 0.05, 0.0, False),
    "vit_s": (512, 12, 0.1, 0.1, False),
    "vit_s_dp005_mask_0": (512, 12, 0.05, 0.0, False),
    "vit_b": (512, 24, 0.1, 0.1, True),
    "vit_b_dp005_mask_005": (512, 24, 0.05, 0.05, True),
    "vit_l_dp005_mask_005": (768, 24, 0.05, 0.05, True),
    "vit_h": (1024, 48, 0.1, 0.0, True),
}
_NUMBER = (int, float)


@dataclass(frozen=True)
class Conversion:
    """A converted configuration."""

    toml: str
    """The settings as TOML, below the notes as comments."""
    notes: list[str]
    """Differences from arcface_torch, and keys without a counterpart, each with the reason."""


def convert_file(path: Path, *, gpus: int) -> Conversion:
    """Convert the arcface_torch configuration at `path`, upon the base.py of its folder, to TOML.

    `gpus`: GPUs of arcface_torch's run, whose `batch_size` is per GPU. Raises UserError, which names file and line,
    where the file is not Python, assigns nothing to `config`, or has a value that cannot be read or has no counterpart.
    """
    if gpus < 1:
        raise UserError(f"gpus is {gpus}: give the number of GPUs of arcface_torch's run, 1 or more")
    values = read_config(path)
    base = path.with_name("base.py")
    if path.name != "base.py" and base.is_file():
        values = read_config(base) | values
    return _Converter(path, values).convert(gpus)


class _Converter:
    """Settings of ours from the keys of theirs, each taken once; keys that are left at the end are notes."""

    def __init__(self, path: Path, values: dict[str, Value]) -> None:
        self.path = path
        self.values = values
        self.left = dict(values)
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.notes: list[str] = []

    def convert(self, gpus: int) -> Conversion:
        """Return the settings as TOML, with notes."""
        accumulation = self.take("gradient_acc", int)
        if accumulation < 1:
            raise self.error("gradient_acc", "must be at least 1")
        optimizer = self.take("optimizer", str)
        self._run()
        self._data()
        self._backbone()
        self._head(optimizer)
        self._optimizer(optimizer)
        self._training(gpus, accumulation, optimizer)
        self._evaluation(accumulation)
        self._left_over()
        self._validate()
        ordered = {section: self.tree[section] for section in Config.model_fields if section in self.tree}
        head = [f"Converted from arcface_torch's {self.path.name}, as trained on {gpus} GPU{'s' if gpus > 1 else ''}."]
        lines = [line for note in head + self.notes for line in textwrap.wrap(note, 116, subsequent_indent="  ")]
        comment = "".join(f"# {''.join(c if c.isprintable() else '?' for c in line)}\n" for line in lines)
        return Conversion(f"{comment}\n{toml.dump(ordered)}", self.notes)

    def take(self, key: str, *kinds: type) -> Any:
        """Return the value of a key, base.py's usual one where no file sets it. Raises UserError for another type."""
        self.left.pop(key, None)
        if key not in self.values:
            if key not in _BASE:
                raise UserError(f"{self.path}:1: config.{key} has no value, neither here nor in base.py beside it")
            return _BASE[key]
        value = self.values[key].value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = {int: "an integer", float: "a number", bool: "True or False", str: "a text", tuple: "a list"}
            raise self.error(key, f"{names.get(kinds[-1], 'None')} is expected")
        return value

    def error(self, key: str, message: str) -> UserError:
        """Return an error about a key, with its file and line."""
        if key not in self.values:
            return UserError(f"{self.path}:1: config.{key}: {message}")
        read = self.values[key]
        shown = "a function" if isinstance(read.value, Function) else repr(read.value)
        return UserError(f"{read.place}: config.{key}: {message}, not {shown}")

    def put(self, setting: str, value: Any, key: str) -> None:
        """Set `section.key` of ours, which comes from `key` of theirs."""
        *sections, last = setting.split(".")
        tree = self.tree
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[last] = value
        self.origins[setting] = key

    def _run(self) -> None:
        output = self.take("output", type(None), str)
        self.put("run.folder", f"work_dirs/{self.path.stem}" if output is None else output, "output")
        self.put("run.seed", self.take("seed", int), "seed")
        if not self.take("resume", bool):
            self.notes.append(
                "resume = False: a run that is found in run.folder is resumed; name a new folder instead."
            )

    def _data(self) -> None:
        rec = self.take("rec", str)
        self.put("data.path", rec, "rec")
        if rec == "synthetic":
            self.notes.append(
                "rec = 'synthetic', one random image for a test of speed, has no counterpart: set data.path."
            )
        dali, workers = self.take("dali", bool), self.take("num_workers", int)
        if dali:
            self.put("data.loader", "dali", "dali")
        self.put("data.threads", 2 if dali else max(workers, 1), "num_workers")
        if self.take("dali_aug", bool) and dali:
            self.notes.append(
                "dali_aug: no hue, blur or reduced resolution here; a tenth of the images lose their colour, as there "
                "(data.augment.gray)."
            )
            self.put("data.augment.gray", 0.1, "dali_aug")
        counted = [key for key in ("num_classes", "num_image") if self.left.pop(key, None)]
        if counted:
            said = " and ".join(f"{key} = {self.values[key].value}" for key in counted)
            self.notes.append(f"{said}: counted in the data here, and told at the start; compare.")

    def _backbone(self) -> None:
        network = self.take("network", str)
        if network in _NETWORKS:
            self.put("backbone.name", _NETWORKS[network], "network")
        elif network in _VITS:
            self._vit(network)
        else:
            known = ", ".join((*_NETWORKS, *_VITS))
            raise self.error("network", f"no counterpart; those with one are {known}")
        self.put("backbone.embedding_size", self.take("embedding_size", int), "embedding_size")
        self.put("backbone.precision", "float16" if self.take("fp16", bool) else "float32", "fp16")
        if self.tree["backbone"]["precision"] == "float16":
            self.put("training.loss_scale_growth_steps", 100, "fp16")
            self.notes.append(
                "Gradients are summed over the ranks in float32, not in float16 as arcface_torch's hook does."
            )

    def _vit(self, network: str) -> None:
        width, depth, drop_path, masked, checkpointed = _VITS[network]
        self.put("backbone.name", "vit_base_patch16_224", "network")
        options: dict[str, Any] = {
            "patch_size": 9,
            "embed_dim": width,
            "depth": depth,
            "num_heads": 8,
            "qkv_bias": False,
        }
        options |= {"class_token": False, "act_layer": "relu6", "drop_path_rate": drop_path}
        self.put("backbone.options", options, "network")
        self.put("backbone.neck", "linear", "network")
        lost = ["its second linear map and BatchNorm before the embedding"]
        lost += [f"the random masking of {masked:.0%} of the patches"] if masked else []
        lost += ["activations computed again in the backward pass, to save memory"] if checkpointed else []
        self.notes.append(f"network = {network!r}: without a counterpart are {'; '.join(lost)}.")

    def _head(self, optimizer: str) -> None:
        margins = self.take("margin_list", tuple)
        if len(margins) != 3 or not all(isinstance(each, _NUMBER) for each in margins):
            raise self.error("margin_list", "three numbers (m1, m2, m3) are expected")
        m1, m2, m3 = map(float, margins)
        if m1 == 1 and m3 == 0:
            loss: dict[str, Any] = {"name": "arcface", "margin": m2, "straight_through": True}
        elif m3 > 0:
            loss = {"name": "cosface", "margin": m3}
            if (m1, m2) != (1, 0):
                self.notes.append(
                    f"margin_list = ({m1}, {m2}, {m3}): arcface_torch leaves out m1 and m2 where m3 > 0, and so does "
                    'this; for all three set head.loss to {name = "combined", m1 = ..., m2 = ..., m3 = ...}.'
                )
        else:
            loss = {"name": "combined", "m1": m1, "m2": m2, "m3": m3}
            self.notes.append(
                f"margin_list = ({m1}, {m2}, {m3}): arcface_torch refuses it; the paper's combined margin."
            )
        for key, value in (loss | {"scale": 64.0}).items():
            self.put(f"head.loss.{key}", value, "margin_list")
        rate = float(self.take("sample_rate", *_NUMBER))
        self.put("head.sample_rate", rate, "sample_rate")
        if rate < 1 and optimizer == "sgd":
            self.put("head.inactive_rows", "lazy", "sample_rate")
        elif rate < 1:
            self.notes.append(
                "sample_rate: classes that take no part in a step stay as they are; AdamW moves them there."
            )
        threshold = float(self.take("interclass_filtering_threshold", *_NUMBER))
        if threshold > 0:
            self.put("head.filter", {"threshold": threshold, "zero": True}, "interclass_filtering_threshold")
        # Whatever `fp16` says, arcface_torch multiplies embeddings and class weights in float32.
        self.put("head.precision", "float32", "fp16")

    def _optimizer(self, name: str) -> None:
        if name not in ("sgd", "adamw"):
            raise self.error("optimizer", "'sgd' or 'adamw' is expected")
        self.put("optimizer.name", name, "optimizer")
        self.put("optimizer.lr", float(self.take("lr", *_NUMBER)), "lr")
        self.put("optimizer.weight_decay", float(self.take("weight_decay", *_NUMBER)), "weight_decay")
        momentum = self.left.pop("momentum", None)
        if name == "sgd":
            self.put("optimizer.momentum", 0.9, "momentum")
            if momentum is not None and momentum.value != 0.9:
                self.notes.append(f"momentum = {momentum.value}: arcface_torch does not read it and takes 0.9.")
        else:
            self.notes.append("AdamW moves the class weights too, as there; head.optimizer gives them another.")

    def _training(self, gpus: int, accumulation: int, optimizer: str) -> None:
        self.put("training.epochs", float(self.take("num_epoch", *_NUMBER)), "num_epoch")
        self.put("training.global_batch", self.take("batch_size", int) * gpus * accumulation, "batch_size")
        self.put("training.accumulation_steps", accumulation, "gradient_acc")
        if accumulation > 1:
            nearer = (
                f"an lr {accumulation} times as large is nearer to it" if optimizer == "sgd" else "AdamW divides it out"
            )
            self.notes.append(
                f"gradient_acc = {accumulation}: gradients are averaged over the passes here, and summed there; "
                f"{nearer}."
            )
        warmup = float(self.take("warmup_epoch", *_NUMBER))
        # Below zero, the rate falls there from the first step on as it does at zero.
        self.put("training.warmup_epochs", max(warmup, 0.0), "warmup_epoch")
        if warmup > 0:
            self.notes.append("warmup_epoch: the first step has a small learning rate here, and the full one there.")
        self.put("training.schedule", "polynomial", "lr")
        self.put("training.clip_norm", 5.0, "lr")
        self.put("training.decay_norms_and_biases", True, "weight_decay")

    def _evaluation(self, accumulation: int) -> None:
        targets = self.take("val_targets", tuple)
        if not all(isinstance(each, str) for each in targets):
            raise self.error("val_targets", "names of verification sets are expected")
        folder = PurePosixPath(self.tree["data"]["path"])
        self.put("evaluation.pairs", [str(folder / f"{each}.bin") for each in targets], "val_targets")
        if targets:
            self.notes.append("val_targets: each file must be there; arcface_torch skips those that are missing.")
        # Steps are passes there and updates here.
        for key, setting in (("verbose", "evaluation.every_steps"), ("frequent", "tracking.every_steps")):
            self.put(setting, max(self.take(key, int) // accumulation, 1), key)
        if not self.take("save_all_states", bool):
            self.notes.append("save_all_states = False: checkpoints are always complete; see checkpoint.every_steps.")

    def _left_over(self) -> None:
        tracked = [key for key in self.left if "wandb" in key or key in ("suffix_run_name", "save_artifacts", "notes")]
        for key in tracked:
            del self.left[key]
        if tracked:
            self.notes.append(
                f"{', '.join(tracked)}: no Weights & Biases here; the run's folder has TensorBoard's files."
            )
        for key, read in self.left.items():
            kind = ", a function" if isinstance(read.value, Function) else ""
            self.notes.append(f"{key}{kind}: left out, as arcface_torch's train_v2.py does not read it.")

    def _validate(self) -> None:
        try:
            Config.model_validate_json(json.dumps(self.tree), context={"check_paths": False, "rendered": None})
        except ValidationError as error:
            lines = [line for item in error.errors() for line in toml.explain(item, Config).splitlines()]
            key = next((self.origins[name] for name in self.origins if lines[0].startswith(f"{name}:")), None)
            place = self.values[key].place if key in self.values else f"{self.path}:1"
            named = f"config.{key}: " if key in self.values else ""
            raise UserError(f"{place}: {named}{'; '.join(lines)}") from None
