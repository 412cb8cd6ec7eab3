"""From the settings of a loss to the loss."""

import torch
from torch import Tensor

from recognition import config
from recognition.head.losses import margins
from recognition.head.losses.base import Loss, Targets
from recognition.head.losses.logistic import UCE, SphereFace2
from recognition.head.losses.softmax import (
    AdaCos,
    AdaFace,
    Circle,
    CurricularFace,
    DividedNegatives,
    ElasticFace,
    MagFace,
    MVSoftmax,
    Softmax,
    SphereFace,
)


def build_loss(settings: config.Loss, num_classes: int, *, seed: int, device: torch.device) -> Loss:
    """The loss that a `head.loss` section describes."""
    match settings:
        case config.Softmax():
            return Softmax(None, lambda targets: targets.product)
        case config.NormFace():
            return Loss(settings.scale, lambda targets: targets.product)
        case config.CosFace():
            return Loss(settings.scale, lambda targets: targets.product - targets.margin_scale * settings.margin)
        case config.ArcFace():
            bend = margins.arcface_straight_through if settings.straight_through else margins.arcface
            return Loss(settings.scale, lambda targets: bend(targets.product, targets.margin_scale * settings.margin))
        case config.Combined():
            return Loss(settings.scale, lambda targets: _combined(settings, targets))
        case config.SphereFace():
            return SphereFace(settings)
        case config.SphereFaceR(version=2):
            return DividedNegatives(settings)
        case config.SphereFaceR():
            factor = settings.margin - 1
            return Loss(
                settings.scale, lambda targets: margins.sphereface_r(targets.product, 1 + targets.margin_scale * factor)
            )
        case config.AdaFace():
            return AdaFace(settings, device)
        case config.MagFace():
            return MagFace(settings)
        case config.ElasticFace():
            return ElasticFace(settings, seed)
        case config.AdaCos():
            return AdaCos(num_classes, device)
        case config.CurricularFace():
            return CurricularFace(settings, device)
        case config.MVSoftmax():
            return MVSoftmax(settings)
        case config.Circle():
            return Circle(settings)
        case config.SphereFace2():
            return SphereFace2(settings, num_classes, device)
        case config.UCE():
            return UCE(settings, num_classes, device)


def _combined(settings: config.Combined, targets: Targets) -> Tensor:
    margin_scale = targets.margin_scale
    m1 = 1 + margin_scale * (settings.m1 - 1)
    return margins.combined(targets.product, m1, margin_scale * settings.m2, margin_scale * settings.m3)
