"""What of a file of weights fits a backbone, this package's, timm's and other trainers', and what is said of it."""

import gzip
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from recognition.config import Backbone as BackboneConfig
from recognition.errors import UserError
from recognition.models.backbone import Backbone, build_backbone
from recognition.models.weights import load_weights, read_weights


def small(**fields: Any) -> Backbone:
    given = {"name": "resnet10t", "image_size": 32, "embedding_size": 16, "neck": "pool", "precision": "float32"}
    return build_backbone(BackboneConfig(**given | fields), seed=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """Another backbone's weights."""
    return build_backbone(BackboneConfig(name="resnet10t", image_size=32, embedding_size=16, neck="pool")).state_dict()


@pytest.fixture(scope="module")
def timms() -> dict[str, torch.Tensor]:
    """What timm's own file of this model holds, drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return timm.create_model("resnet10t").state_dict()


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".bin"])
def test_own_weights_from_a_file(suffix: str, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"backbone{suffix}"
    state = {f"_orig_mod.{name}": tensor.contiguous() for name, tensor in whole.items()}
    if suffix in (".safetensors", ".bin"):  # known by its content
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    backbone = small()
    assert load_weights(backbone, read_weights(path), path) == [f"weights from {path}: trunk and neck"]
    assert same(backbone.state_dict(), whole)


WRAPPINGS = {
    "plain": lambda state, other: state,
    "DDP": lambda state, other: prefixed(state, "module."),
    "net_state_dict": lambda state, other: {"epoch": 3, "net_state_dict": state, "acc": 0.9},
    "model_state_dict": lambda state, other: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "model and optimizer": lambda state, other: {"model": state, "optimizer": {"state": {0: {"exp_avg": other}}}},
    "lightning": lambda state, other: {
        "pytorch-lightning_version": "2.4",
        "state_dict": prefixed(state, "model.backbone.") | {"head.kernel": torch.zeros(16, 10)},
        "optimizer_states": [],
    },
    "lightning net": lambda state, other: {"state_dict": prefixed(state, "net.")},
    "averaged": lambda state, other: {"state_dict": other, "state_dict_ema": prefixed(state, "module.")},
    "arcface_torch": lambda state, other: {"state_dict_backbone": prefixed(state, "module.")},
    "compiled and deep": lambda state, other: {"algorithm": {"nets": {"student": prefixed(state, "_orig_mod.")}}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_other_trainers_wrappings(
    wrapping: str, kind: str, whole: dict[str, torch.Tensor], timms: dict[str, torch.Tensor]
) -> None:
    backbone = small()
    neck = {name: tensor.clone() for name, tensor in backbone.neck.state_dict().items()}
    state = whole if kind == "whole" else {name: t for name, t in timms.items() if not name.startswith("fc.")}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    notes = load_weights(backbone, WRAPPINGS[wrapping](state, other), "file.pt")
    if kind == "whole":
        assert same(backbone.state_dict(), whole)
    else:
        assert same(backbone.trunk.state_dict(), state)
        assert same(backbone.neck.state_dict(), neck)
        assert "the neck starts anew" in notes[0]
    assert ("1 tensor" in notes[-1]) == (wrapping == "lightning")
    assert ("state_dict_ema, names without 'module.'" in notes[0]) == (wrapping == "averaged")


def test_timms_file_loads_into_the_trunk_and_what_is_dropped_is_said(timms: dict[str, torch.Tensor]) -> None:
    backbone = small(name="resnet10t.c3_in1k")
    notes = load_weights(backbone, timms, "resnet10t.pt")
    assert notes == [
        "weights from resnet10t.pt: trunk alone, the neck starts anew",
        "weights of the classifier are left out: trunk.fc.weight, trunk.fc.bias",
    ]
    reference = timm.create_model("resnet10t", num_classes=0, global_pool="").eval()
    reference.load_state_dict({name: tensor for name, tensor in timms.items() if not name.startswith("fc.")})
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.eval().trunk(images), reference(images))


def test_the_position_embedding_of_another_image_size_is_resampled_as_timm_does() -> None:
    state = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1).state_dict()
    backbone = small(name="vit_tiny_patch16_224", options={"depth": 1}, image_size=48)
    notes = load_weights(backbone, state, "vit.pt")
    assert "adapted by timm" in notes[0]
    resample = timm.layers.resample_abs_pos_embed
    expected = resample(state["pos_embed"], new_size=[3, 3], num_prefix_tokens=1)
    torch.testing.assert_close(backbone.get_parameter("trunk.pos_embed").detach(), expected)
    assert torch.equal(backbone.get_parameter("trunk.blocks.0.attn.qkv.weight"), state["blocks.0.attn.qkv.weight"])


def test_the_recipe_for_pretrained_weights_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        small(options={"pretrained": True})
    setting = re.search(r"set backbone\.weights=(\S+),", str(caught.value))
    command = re.search(r'python -c "(.*)"', str(caught.value))
    assert setting and command
    exec(command[1].replace("pretrained=True", "pretrained=False"))  # without the network
    backbone = small()
    load_weights(backbone, read_weights(Path(setting[1])), setting[1])
    assert torch.equal(backbone.get_parameter("trunk.conv1.0.weight"), torch.load(setting[1])["conv1.0.weight"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def broken(kind: str, folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A file that holds no weights, or not those that fit."""
    path = folder / "weights.pt"
    contents: dict[str, Any] = {
        "code": {"a": Evil()},
        "list": [1, 2],
        "numbers": {"epoch": 3, "best": 0.5},
        "nothing": {},
        "other size": small(embedding_size=8).state_dict(),
        "other network": timm.create_model("resnet18").state_dict(),
        "AdaFace": {"state_dict": {"model.input_layer.0.weight": state["trunk.conv1.0.weight"]}},
        "not finite": state | {"trunk.bn1.bias": torch.full_like(state["trunk.bn1.bias"], torch.nan)},
    }
    files = {
        "page": b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "gzip": gzip.compress(b"weights"),
        "empty": b"",
        "noise": b"noise",
    }
    if kind in contents:
        torch.save(contents[kind], path)
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "part":
        path = path.with_name("__0_0.distcp")
        torch.save(state, path)
    else:
        path.write_bytes(files[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("code", r"holds more than tensors; save it anew with torch\.save"),
        ("list", "is not a state dict: one object of the type list"),
        ("numbers", "is not a state dict: keys epoch, best"),
        ("nothing", "is not a state dict: keys none"),
        ("other size", r"neck.linear.weight \[8, 512\] for \[16, 512\]"),
        ("other network", r"lacks trunk\.conv1\.0\.weight"),
        ("AdaFace", "AdaFace's and TFace's IResNet, for which there is no converter"),
        ("not finite", r"trunk\.bn1\.bias has numbers that are not finite"),
        ("page", "an HTML page"),
        ("pointer", "Git LFS pointer"),
        ("gzip", "gzip-compressed"),
        ("empty", "an empty file"),
        ("noise", "is no file of weights, but text"),
        ("cut", "damaged, or cut short; fetch it anew"),
        ("part", r"one file of a checkpoint: give the folder of the run"),
    ],
)
def test_weights_that_cannot_be_used(
    kind: str, wanted: str, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = broken(kind, tmp_path, whole)
    backbone = small()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(UserError, match=wanted) as caught:
        load_weights(backbone, read_weights(path), path)
    assert str(caught.value).startswith(f"backbone.weights: {path}")
    assert same(backbone.state_dict(), before)
    assert not (tmp_path / "executed").exists()


def test_evil_is_evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").exists()


def test_a_deeper_network_is_not_cut_to_fit() -> None:
    """A ResNet-34 has all names of a ResNet-18, with the same shapes, and more."""
    with pytest.raises(UserError, match=r"unexpectedly, trunk\.layer1\.2\.conv1\.weight"):
        load_weights(small(name="resnet18"), timm.create_model("resnet34").state_dict(), "resnet34.pt")
