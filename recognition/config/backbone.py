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
    """Any timm model, with our own `iresnet18/34/50/100/200` and `mobilefacenet`."""
    options: dict[str, Annotated[Any, AfterValidator(_scalar)]] = Field(default_factory=dict)
    """Further keyword arguments of the timm model, for example `{drop_path_rate = 0.05}`."""
    image_size: PositiveInt = 112
    """Height and width of the input, in pixels."""
    embedding_size: PositiveInt = 512
    """Length of the embedding, D."""
    neck: Literal["auto", "flatten", "pool", "linear"] = "auto"
    """From feature map to embedding, each with a linear layer and BN last. `flatten`: BN, dropout, flatten before it;
    `pool`: BN, mean, dropout; `linear`: flatten alone. `auto`: what the model asks for, else `flatten`."""
    dropout: BelowOne = 0.0
    """Dropout in the neck."""
    weights: InputPath | None = None
    """Where to start from: a run's folder (its newest checkpoint), a checkpoint's folder, or a file with a state dict:
    ours, InsightFace's `backbone.pth` for IResNet and MobileFaceNet, or timm's for the trunk; its neck starts anew."""
    freeze: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    """Modules that stay as `weights` have them, their running statistics too: names as `named_modules` has them, for
    example `["trunk.stem", "trunk.layer1"]`; one stands for all below it."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of products and convolutions; parameters stay float32. `float16` scales the loss, so that small gradients do
    not vanish, and keeps a float32 gradient of the class weights until the backbone's is known. `auto`: bfloat16 where
    the hardware has units for it (NVIDIA from Ampere on; AMX, AVX-512 or Arm with bfloat16), float16 on NVIDIA's Volta
    and Turing, else float32."""
    channels_last: Literal["auto", True, False] = "auto"
    """Memory format of images and convolutions. `auto`: channels-last."""
    compile: Literal["auto", True, False] = "auto"
    """Run the backbone through `torch.compile`: on a CPU it needs a C++ compiler, on a GPU Triton. `auto`: do not."""
