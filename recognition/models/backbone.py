"""The network from image to embedding: a trunk (any timm model) and a neck.

The trunk runs in the configured precision, the neck in float32; parameters are float32 either way. Dropout and drop
path draw from torch's default generator: call `seed_step` before each forward pass.
"""

import difflib
import hashlib
import inspect
import re
import sys
from collections.abc import Sequence

import numpy as np
import timm
import torch
from torch import Tensor, nn

from recognition import hardware
from recognition.config import Backbone as BackboneConfig
from recognition.errors import UserError
from recognition.models import iresnet as iresnet  # registered with timm by their import
from recognition.models import mobilefacenet as mobilefacenet
from recognition.models.layers import average_running_statistics as average_running_statistics

_OWN_OPTIONS = {
    "img_size": "set backbone.image_size",
    "in_chans": "images have three channels",
    "num_classes": "the classes are the head's",
    "global_pool": "set backbone.neck",
    "pretrained": "set backbone.weights",
    "checkpoint_path": "set backbone.weights",
    "features_only": "the last feature map is taken",
}
"""Arguments of timm models that may not be options, each with the alternative."""

_UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got (?:an )?unexpected keyword argument(?:\(s\): \[| )'(\w+)'")
"""Messages of Python and timm on an argument that a class does not have."""


class Neck(nn.Module):
    """Map from the feature map to the embedding; the last BatchNorm has no learned scale (its weight stays 1).

    `flatten`: BN, dropout, flatten, linear, BN. `pool`: BN, mean over the positions, dropout, linear, BN. `linear`:
    dropout, flatten, linear, BN. The linear map has no bias, which the BatchNorm after it would take out.
    """

    def __init__(self, kind: str, channels: int, positions: int, size: int, dropout: float) -> None:
        super().__init__()
        self.pool = kind == "pool"
        self.norm = nn.Identity() if kind == "linear" else nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels if self.pool else channels * positions, size, bias=False)
        self.output_norm = nn.BatchNorm1d(size)
        self.output_norm.weight.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Map [b,C,h,w] to [b,D]."""
        x = self.norm(features)
        x = x.mean((2, 3)) if self.pool else x.flatten(1)
        return self.output_norm(self.linear(self.dropout(x)))


class Backbone(nn.Module):
    """Trunk and neck: images [b,3,H,W] float32 in [-1,1] to embeddings [b,D] float32, not normalised."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.embedding_size = config.embedding_size
        config = hardware.resolve_backbone(config, hardware.detect(torch.device("cpu")))
        self.precision = hardware.DTYPES[config.precision]
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.trunk, features = _build_trunk(config)
        # Maps of square images are square, which tells [b,h,w,C] from [b,C,h,w]; tokens are [b,n,C].
        self.channels_at_end = features.ndim == 3 or (features.ndim == 4 and features.shape[2] != features.shape[3])
        self.prefix_tokens = int(getattr(self.trunk, "num_prefix_tokens", 0)) if features.ndim == 3 else 0
        _, channels, height, breadth = self._as_map(features).shape
        kind = getattr(self.trunk, "preferred_neck", "flatten") if config.neck == "auto" else config.neck
        if kind != "pool" and config.options.get("patch_drop_rate"):
            raise UserError("backbone.options.patch_drop_rate: the number of tokens varies; set backbone.neck = 'pool'")
        self.neck = Neck(kind, channels, height * breadth, config.embedding_size, config.dropout)
        self.to(memory_format=self.memory_format)
        self.frozen = freeze(self, config.freeze)

    def train(self, mode: bool = True) -> "Backbone":
        """Set the training mode; frozen modules stay in evaluation mode, so that their statistics do not change."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor, *, float32: bool = False) -> Tensor:
        """Embed images [b,3,H,W] float32 in [-1,1] as [b,D] float32; with `float32`, without autocast."""
        device, mixed = images.device.type, self.precision != torch.float32 and not float32
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(device, dtype=self.precision, enabled=mixed):
            features = self.trunk(images)
        with torch.autocast(device, enabled=False):
            return self.neck(self._as_map(features).float())

    def _as_map(self, features: Tensor) -> Tensor:
        """Reshape any trunk's output to [b,C,h,w]: tokens become one column, a pooled vector one position."""
        if features.ndim == 2:
            return features[:, :, None, None]
        if features.ndim == 3:
            features = features[:, self.prefix_tokens :, None]
        return features.permute(0, 3, 1, 2) if self.channels_at_end else features


def build_backbone(config: BackboneConfig, seed: int = 0) -> Backbone:
    """Build the backbone with initial weights that are a function of `seed`; `config.weights` is the caller's to load.

    The state of torch's generators does not change. Raises UserError for an unknown model or option, and for an image
    size that the model does not accept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_key("backbone", seed))
        backbone = Backbone(config)
    if config.compile is True:
        backbone.trunk.compile()
    return backbone


def freeze(backbone: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Freeze the modules called `names`, and all below them: evaluation mode, and no gradients.

    Returns the names. Raises UserError for a name that the backbone does not have, or of a module without weights.
    """
    modules = {name: module for name, module in backbone.named_modules() if name}
    for name in names:
        if name not in modules:
            near = [f"trunk.{name}"] if f"trunk.{name}" in modules else difflib.get_close_matches(name, modules, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            parts = [each for each, module in modules.items() if each.count(".") < 2 and module.state_dict()]
            raise UserError(
                f"backbone.freeze: no module {name}{hint}\n  it has {', '.join(parts)}, and others in these"
            )
        if not modules[name].state_dict():
            raise UserError(f"backbone.freeze: {name} has no weights to freeze; name the module that has")
        modules[name].requires_grad_(False).eval()
    return tuple(names)


def describe(backbone: nn.Module, config: BackboneConfig) -> str:
    """Say in one line what a backbone is and how much of it trains."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in backbone.parameters()]
    line = f"{config.name}, {sum(size for size, _ in sizes) / 1e6:.1f} M parameters"
    if not config.freeze:
        return line
    learning = sum(size for size, learns in sizes if learns)
    return f"{line}, of which {learning / 1e6:.1f} M train; frozen: {', '.join(config.freeze)}"


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key torch's default generators (CPU and GPU) by (seed, step, rank).

    Called before every forward pass in training, it makes dropout and drop path a function of the three, so that no
    generator's state has to be saved. `step` counts forward passes, also those within one update.
    """
    torch.manual_seed(_key("step", seed, step, rank))


class BackboneEmbedder:
    """Backbone behind the Embedder interface: uint8 images in, embeddings out, in evaluation mode.

    It computes in the backbone's configured precision, as verification in training should; `float32` turns autocast
    off, for comparison with an exported model.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str = "cpu", *, float32: bool = False) -> None:
        self.backbone = backbone
        self.device = torch.device(device)
        self.float32 = float32
        self.image_size = backbone.image_size
        self.embedding_size = backbone.embedding_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed RGB images, uint8 [n,H,W,3], as float32 [n,D], not normalised; the training mode is restored.

        Raises ValueError for images of another type.
        """
        if images.dtype != np.uint8:
            raise ValueError(f"images are uint8, not {images.dtype}")
        if not len(images):
            return np.zeros((0, self.embedding_size), np.float32)
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(self.device)
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.inference_mode():
                batch = pixels.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
                return self.backbone(batch, float32=self.float32).cpu().numpy()
        finally:
            self.backbone.train(was_training)


def _key(*parts: str | int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _build_trunk(config: BackboneConfig) -> tuple[nn.Module, Tensor]:
    """Create the timm model; return it and its output for one image.

    Not every model accepts the image size as an argument or can leave its pooling out, so combinations are tried.
    """
    name = _without_tag(config.name)
    for option, instead in _OWN_OPTIONS.items():
        if option in config.options:
            if option == "pretrained":
                instead += _pretrained_advice(config.name)
            raise UserError(f"backbone.options.{option}: not an option; {instead}")
    size = {"img_size": config.image_size}
    unpooled = {"global_pool": ""}
    mistakes: list[Exception] = []
    for arguments in (size | unpooled, unpooled, size, {}):
        try:
            trunk = timm.create_model(name, num_classes=0, **arguments, **config.options)
            return trunk, _probe(trunk, config.image_size)
        except Exception as error:
            _check_options(config, error)
            mistakes.append(error)
    chosen = [error for error in mistakes if not _UNEXPECTED.search(str(error))] or mistakes
    options = f", options {config.options}" if config.options else ""
    reason = f"{type(chosen[0]).__name__}: {chosen[0]}"
    size_text = f"{config.image_size}x{config.image_size}"
    raise UserError(f"backbone: {config.name} does not work with {size_text} images{options}: {reason}") from chosen[0]


def _without_tag(name: str) -> str:
    """Return a model's name without timm's tag for a file of weights. Raises UserError for an unknown name."""
    known = timm.list_models()
    architecture, _, tag = name.partition(".")
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"backbone.name: no timm model {name}; {hint}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(
            f"backbone.name: timm has no weights {name}, but {', '.join(tags) or 'none'}; {architecture} alone will do"
        )
    return architecture


def _pretrained_advice(name: str) -> str:
    """Explain how to get timm's weights of a model, as the end of the sentence "set backbone.weights"."""
    if not timm.list_pretrained(f"{name.partition('.')[0]}.*"):
        return f" to a file of weights; timm has none of {name}"
    command = f"import timm, torch; torch.save(timm.create_model('{name}', pretrained=True).state_dict(), '{name}.pt')"
    return f'={name}.pt, which this makes where there is a network:\n  python -c "{command}"'


def _check_options(config: BackboneConfig, error: Exception) -> None:
    """Raise UserError if `error` says that the model has no such option as one of the configured ones."""
    refused = _UNEXPECTED.search(str(error))
    if refused is None or refused[2] not in config.options:
        return
    module = sys.modules[timm.models.model_entrypoint(_without_tag(config.name)).__module__]
    taker = getattr(module, refused[1], None)
    parameters = inspect.signature(taker).parameters.values() if taker else []
    names = [each.name for each in parameters if each.default is not each.empty and each.name not in _OWN_OPTIONS]
    near = difflib.get_close_matches(refused[2], names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'}"
    raise UserError(f"backbone.options.{refused[2]}: {config.name} has no such option; {hint}") from error


def _probe(trunk: nn.Module, image_size: int) -> Tensor:
    """Run the trunk on one gray image, in evaluation mode; the shape of the output sizes the neck."""
    trunk.eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, 3, image_size, image_size))
    trunk.train()
    if not isinstance(features, Tensor) or not 2 <= features.ndim <= 4 or not features.numel():
        raise ValueError("its output is not one feature map")
    return features
