"""Count what a backbone costs to train, from the shapes of its tensors alone: nothing is allocated."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from recognition.config import Backbone as BackboneConfig
from recognition.models.backbone import Backbone


@dataclass(frozen=True)
class BackboneCost:
    """Cost of training a backbone, for one rank."""

    parameters: int
    """Number of parameters, float32 each."""
    forward_flops: int
    """Floating-point operations of one image's convolutions and matrix products; the backward pass takes twice them."""
    activation_bytes: int
    """Bytes per image: activations saved for the backward pass, and two of its largest gradients."""
    copied_bytes: int
    """Bytes saved whatever the batch: the weights in the products' type."""


def backbone_cost(settings: BackboneConfig) -> BackboneCost:
    """Return the cost of the backbone that `settings` describe.

    Raises UserError for one that does not exist or does not work.
    """
    with torch.device("meta"):
        backbone = Backbone(settings).train()
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    (flops, small), (_, large) = (_forward(backbone, batch) for batch in (2, 4))
    # What grows with the batch belongs to the images, two more of them; the rest is copies of the weights.
    activations = (sum(large) - sum(small)) // 2
    copies = max(0, sum(small) - 2 * activations)
    # The largest tensors differ by those of two images, which stand for two gradients of one.
    return BackboneCost(parameters, flops // 2, activations + (max(large) - max(small)), copies)


def _forward(backbone: Backbone, batch: int) -> tuple[int, list[int]]:
    """Return the operations of a forward pass, and the bytes of each tensor that autograd saves, but parameters."""
    saved: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode():
        state = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]
        }
        for name, parameter in backbone.named_parameters():
            state[name].requires_grad_(parameter.requires_grad)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        images = torch.empty(batch, 3, backbone.image_size, backbone.image_size)
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            torch.func.functional_call(backbone, state, (images,))
        return counter.get_total_flops(), [storage.nbytes() for storage in saved.values()]
