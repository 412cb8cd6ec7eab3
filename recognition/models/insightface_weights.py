"""Converter of InsightFace's published `backbone.pth` to this package's names of tensors.

Names and shapes of the tensors are those of deepinsight/insightface, recognition/arcface_torch (IResNet and `mbf`).
"""

import re
from collections.abc import Mapping

from torch import Tensor

_IRESNET = {
    "conv1": "trunk.stem.0",
    "bn1": "trunk.stem.1",
    "prelu": "trunk.stem.2",
    "bn2": "neck.norm",
    "fc": "neck.linear",
    "features": "neck.output_norm",
}
_IRESNET_BLOCK = {"bn1": "norm1", "bn2": "norm2", "bn3": "norm3", "prelu": "act", "downsample": "shortcut"}

_MOBILEFACENET = {
    "layers.0.layers": "trunk.stem.0",
    "layers.1.layers": "trunk.stem.1",
    "conv_sep.layers": "trunk.expand",
    "features.layers.0.layers": "trunk.pool",
    "features.layers.2": "neck.linear",
    "features.layers.3": "neck.output_norm",
}
_MOBILEFACENET_BLOCK = ("expand", "depthwise", "project")
_CONV = ("conv", "norm", "act")


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under our names if it is InsightFace's IResNet or MobileFaceNet, else unchanged.

    Their linear layer has a bias, and ours has none, since the BatchNorm behind it removes it. The file's bias is
    subtracted from that BatchNorm's running mean, which leaves the function unchanged.
    """
    if "conv_sep.layers.0.weight" in state:
        rename = _mobilefacenet
    elif {"conv1.weight", "prelu.weight", "features.weight"} <= state.keys():
        rename = _iresnet
    else:
        return dict(state)
    ours = {rename(name): tensor for name, tensor in state.items()}
    bias = ours.pop("neck.linear.bias", None)
    mean = ours.get("neck.output_norm.running_mean")
    if bias is not None and mean is not None and mean.shape == bias.shape:
        ours["neck.output_norm.running_mean"] = mean - bias
    return ours


def _iresnet(name: str) -> str:
    """Rename a tensor of IResNet."""
    module, _, tensor = name.rpartition(".")
    if module in _IRESNET:
        return f"{_IRESNET[module]}.{tensor}"
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)(.*)", name)
    if block is None:
        return name
    stage, index, part, rest = block.groups()
    return f"trunk.stages.{int(stage) - 1}.{index}.{_IRESNET_BLOCK.get(part, part)}{rest}"


def _mobilefacenet(name: str) -> str:
    """Rename a tensor of MobileFaceNet: even `layers` halve the resolution, the odd one after each is residual."""
    for theirs, ours in _MOBILEFACENET.items():
        if name.startswith(f"{theirs}."):
            rest = name.removeprefix(f"{theirs}.")
            if ours.startswith("trunk"):
                index, _, tensor = rest.partition(".")
                rest = f"{_CONV[int(index)]}.{tensor}"
            return f"{ours}.{rest}"
    block = re.fullmatch(r"layers\.(\d)\.(?:layers\.(\d+)\.)?layers\.(\d)\.layers\.(\d)\.(\w+)", name)
    if block is None:
        return name
    stage, index, part, layer, tensor = block.groups()
    place = 0 if index is None else int(index) + 1
    return f"trunk.stages.{int(stage) // 2 - 1}.{place}.{_MOBILEFACENET_BLOCK[int(part)]}.{_CONV[int(layer)]}.{tensor}"
