"""MobileFaceNet: inverted residuals with PReLU and a depthwise convolution over the whole last map.

Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices", 2018, in the
width and depth that InsightFace publishes. Images [b,3,H,W] -> [b,512,1,1].
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from recognition.models.layers import GroupedConv2d, PReLU


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    # The kernels for stride 1 and one channel a group are fast in every precision.
    slow = groups > 1 and (stride > 1 or groups < inputs)
    convolution = GroupedConv2d if slow else nn.Conv2d
    layers: list[tuple[str, nn.Module]] = [
        ("conv", convolution(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)),
        ("norm", nn.BatchNorm2d(outputs)),
    ]
    if act:
        layers.append(("act", PReLU(outputs)))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.expand = _conv(inputs, hidden, 1)
        self.depthwise = _conv(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = _conv(hidden, outputs, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b,inputs,h,w] to [b,outputs,h/stride,w/stride]."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileFaceNet(nn.Module):
    """Trunk that ends in a global depthwise convolution, whose kernel is as large as the last feature map."""

    preferred_neck = "linear"

    def __init__(
        self, depths: Sequence[int] = (4, 6, 2), width: int = 128, in_chans: int = 3, img_size: int = 112
    ) -> None:
        super().__init__()
        self.num_features = 512
        # Groups of two channels, not one: InsightFace doubles the width and keeps the paper's number of groups.
        self.stem = nn.Sequential(_conv(in_chans, width, 3, stride=2), _conv(width, width, 3, groups=width // 2))
        inputs = (width, width, 2 * width)
        outputs = (width, 2 * width, 2 * width)
        hidden = (width, 2 * width, 4 * width)
        self.stages = nn.Sequential()
        for i, o, h, depth in zip(inputs, outputs, hidden, depths, strict=True):
            self.stages.append(
                nn.Sequential(Block(i, o, h, 2), *(Block(o, o, min(h, 2 * width), 1) for _ in range(depth)))
            )
        self.expand = _conv(outputs[-1], self.num_features, 1)
        side = -(-img_size // 16)
        self.pool = nn.Sequential(
            OrderedDict(
                conv=GroupedConv2d(self.num_features, self.num_features, side, groups=self.num_features, bias=False),
                norm=nn.BatchNorm2d(self.num_features),
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [b,3,H,W] to [b,512,1,1]."""
        return self.pool(self.expand(self.stages(self.stem(images))))


@register_model
def mobilefacenet(
    pretrained: bool = False, num_classes: int = 0, global_pool: str = "", **options: Any
) -> MobileFaceNet:
    """Build MobileFaceNet as InsightFace's `mbf`: twice the paper's width, 4, 6 and 2 residual blocks."""
    for timm_argument in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(timm_argument, None)
    if pretrained or num_classes or global_pool:
        raise ValueError("MobileFaceNet is a trunk: pretrained=False, num_classes=0 and global_pool=''")
    return MobileFaceNet(**options)
