"""IResNet 18 to 200: ResNet with pre-activation blocks, PReLU and a stem that keeps the resolution.

Improved residual networks: Duta et al., "Improved Residual Networks for Image and Video Recognition", 2020, in the form
that InsightFace trains for faces (Deng et al., "ArcFace", 2019). Images [b,3,H,W] -> feature map [b,512,H/16,W/16].
"""

from collections.abc import Sequence
from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from recognition.models.layers import PReLU


class Block(nn.Module):
    """BN, conv 3x3, BN, PReLU, strided conv 3x3, BN, added to the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.act = PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b,inputs,h,w] to [b,outputs,h/stride,w/stride]."""
        inner = self.act(self.norm2(self.conv1(self.norm1(x))))
        return self.norm3(self.conv2(inner)) + self.shortcut(x)


class IResNet(nn.Module):
    """Trunk of a stem and four stages that each halve the resolution."""

    preferred_neck = "flatten"

    def __init__(self, depths: Sequence[int], in_chans: int = 3) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.num_features = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), PReLU(widths[0])
        )
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(inputs, outputs, 2), *(Block(outputs, outputs, 1) for _ in range(depth - 1)))
                for inputs, outputs, depth in zip(widths[:-1], widths[1:], depths, strict=True)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [b,3,H,W] to a feature map [b,512,H/16,W/16]."""
        return self.stages(self.stem(images))


def _iresnet(
    depths: Sequence[int], pretrained: bool, num_classes: int = 0, global_pool: str = "", **options: Any
) -> IResNet:
    for timm_argument in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(timm_argument, None)
    if pretrained or num_classes or global_pool:
        raise ValueError("IResNet is a trunk: pretrained=False, num_classes=0 and global_pool=''")
    return IResNet(depths, **options)


@register_model
def iresnet18(pretrained: bool = False, **options: Any) -> IResNet:
    """Build IResNet-18."""
    return _iresnet((2, 2, 2, 2), pretrained, **options)


@register_model
def iresnet34(pretrained: bool = False, **options: Any) -> IResNet:
    """Build IResNet-34."""
    return _iresnet((3, 4, 6, 3), pretrained, **options)


@register_model
def iresnet50(pretrained: bool = False, **options: Any) -> IResNet:
    """Build IResNet-50."""
    return _iresnet((3, 4, 14, 3), pretrained, **options)


@register_model
def iresnet100(pretrained: bool = False, **options: Any) -> IResNet:
    """Build IResNet-100."""
    return _iresnet((3, 13, 30, 3), pretrained, **options)


@register_model
def iresnet200(pretrained: bool = False, **options: Any) -> IResNet:
    """Build IResNet-200."""
    return _iresnet((6, 26, 60, 6), pretrained, **options)
