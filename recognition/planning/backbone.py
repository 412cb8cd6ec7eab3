"""What a backbone costs to train, counted by the shapes alone of what flows through it: nothing is allocated."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from recognition.config import Backbone as BackboneConfig
from recognition.models.backbone import Backbone


@dataclass(frozen=True)
class BackboneCost:
    """What one rank needs."""

    parameters: int
    """How many, float32 each."""
    forward_flops: int
    """Floating-point operations of one image's convolutions and matrix products; the backward pass takes twice them."""
    activation_bytes: int
    """What one image leaves for the backward pass, and two of the largest gradients on the way."""
    copied_bytes: int
    """What is kept whatever the batch: weights in the products' type."""


def backbone_cost(settings: BackboneConfig) -> BackboneCost:
    """Count the backbone that `settings` describe. Raises UserError for one that does not exist or does not work."""
    with torch.device("meta"):
        backbone = Backbone(settings).train()
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    (flops, small), (_, large) = (_forward(backbone, batch) for batch in (2, 4))
    # What doubles with the batch belongs to the images.
    kept = (sum(large) - sum(small)) // 2
    return BackboneCost(parameters, flops // 2, kept + (max(large) - max(small)), max(0, sum(small) - 2 * kept))


def _forward(backbone: Backbone, batch: int) -> tuple[int, list[int]]:
    """Floating-point operations of a forward pass, and the bytes of each thing that it keeps beside the parameters."""
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        state = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        for name, parameter in backbone.named_parameters():
            state[name].requires_grad_(parameter.requires_grad)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        images = torch.empty(batch, 3, backbone.image_size, backbone.image_size)
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            torch.func.functional_call(backbone, state, (images,))
        return counter.get_total_flops(), [storage.nbytes() for storage in kept.values()]
