"""The network from image to embedding."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from recognition.config.base import BelowOne, InputPath, Section, as_list


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("a number, a string, true or false is expected")
    return value


class Backbone(Section):
    """The network from image to embedding."""

    name: str = "iresnet50"
    """Network: `iresnet18`, `iresnet34`, `iresnet50`, `iresnet100`, `iresnet200`, `mobilefacenet`, or any model of
    timm."""
    options: dict[str, Annotated[Any, AfterValidator(_scalar)]] = Field(default_factory=dict)
    """Further keyword arguments of the network, for example `{drop_path_rate = 0.05}`."""
    image_size: PositiveInt = 112
    """Height and width of the input images, in pixels."""
    embedding_size: PositiveInt = 512
    """Length of the embedding (D)."""
    neck: Literal["auto", "flatten", "pool", "linear"] = "auto"
    """Layers between the last feature map and the embedding. `flatten`: BatchNorm, dropout, flatten; `pool`:
    BatchNorm, mean over the positions, dropout; `linear`: dropout, flatten; each is followed by a linear layer and
    BatchNorm. `auto`: the one that the network prefers, else `flatten`."""
    dropout: BelowOne = 0.0
    """Probability of dropout in the neck."""
    weights: InputPath | None = None
    """Initial weights, for fine-tuning: a run's folder (its newest checkpoint), a checkpoint's folder, or a
    state-dict file of this program, of InsightFace (`backbone.pth` of IResNet and MobileFaceNet) or of timm (without
    the neck, which is initialised at random). Default: random weights."""
    freeze: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    """Modules that keep the values of `weights`, BatchNorm statistics included, for example `["trunk.stem",
    "trunk.layer1"]`. Names are those of PyTorch's `named_modules`; each includes all modules below it."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of convolutions and matrix products; parameters stay float32. `float16` uses loss scaling and needs
    memory for a float32 gradient of the class weights. `auto`: bfloat16 where the hardware supports it (NVIDIA from
    Ampere on; CPUs with AMX, AVX-512 or Arm bfloat16), float16 on NVIDIA Volta and Turing, else float32."""
    channels_last: Literal["auto", True, False] = "auto"
    """Memory format of images and convolutions: true for channels-last, false for channels-first. `auto`:
    channels-last."""
    compile: Literal["auto", True, False] = "auto"
    """Whether the backbone runs through `torch.compile`, which needs a C++ compiler on a CPU and Triton on a GPU.
    `auto`: false."""
