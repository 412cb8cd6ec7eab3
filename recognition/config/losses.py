"""Settings of the losses over classes, and of those on embeddings that may join them; each names its paper.

`[head.loss]` takes any subclass of `Loss` that has a `name`. Its computation is the class of the package's
`head/losses` whose `settings` are of that type: `CosFace` here, `CosFaceLoss` there.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler, NonNegativeFloat, PositiveFloat, model_validator
from pydantic_core import CoreSchema

from recognition.config.base import Fraction, Section

Angle = Annotated[float, Field(ge=0, lt=3.1415)]
AngleFactor = Annotated[float, Field(ge=1)]


_BY_NAME: dict[str, type["Loss"]] = {}


class Loss(Section):
    """Base of the losses over classes. A field of this type holds one of its named subclasses, chosen by `name`.

    A subclass with the field `name: Literal["..."] = "..."` is found by that name, without being listed anywhere.
    Sections that exist by then have to be built anew: `Head.model_rebuild(force=True)`, then `Config`.
    Raises TypeError when the name is taken.
    """

    unit_embeddings: ClassVar[bool] = True
    """Whether embeddings count by their direction alone."""
    unit_rows: ClassVar[bool] = True
    """Whether classes' rows count by their direction alone. Rows that do not have a bias."""

    if TYPE_CHECKING:
        name: str

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        """Return the named subclasses for `Loss` itself, and the class alone for any other."""
        return tuple(_BY_NAME.values()) if cls is Loss else (cls,)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" in cls.model_fields:
            name = cls.model_fields["name"].default
            if name in _BY_NAME:
                raise TypeError(f"two losses are called {name}: {_BY_NAME[name].__name__} and {cls.__name__}")
            _BY_NAME[name] = cls

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not _BY_NAME or cls is not Loss:
            return handler(source)
        union = reduce(or_, cls.variants())
        return handler.generate_schema(Annotated[union, Field(discriminator="name")])


class ScaledLoss(Loss):
    """Base of the losses on cosines that a constant scale makes large enough for a softmax."""

    scale: PositiveFloat = 64.0
    """s, factor on the cosines."""


class Softmax(Loss):
    """The textbook softmax: `x . w + b` with nothing normalised."""

    unit_embeddings = False
    unit_rows = False
    name: Literal["softmax"] = "softmax"


class NormFace(ScaledLoss):
    """NormFace (Wang et al. 2017): `s cos(theta)`."""

    name: Literal["normface"] = "normface"


class SphereFace(Loss):
    """SphereFace, A-Softmax (Liu et al. 2017): `|x| psi(theta)` for the target, `|x| cos(theta)` for the others.

    psi joins the pieces of `cos(m theta)` to a falling curve. The target's cosine is blended in by a weight lambda
    that anneals from `lambda_start` to `lambda_end` as steps pass.
    """

    unit_embeddings = False
    name: Literal["sphereface"] = "sphereface"
    margin: AngleFactor = 4.0
    """m, factor on the angle"""
    lambda_start: NonNegativeFloat = 1000.0
    """lambda of the first step"""
    lambda_decay: NonNegativeFloat = 0.12
    """lambda is `lambda_start / (1 + lambda_decay step)`, but at least `lambda_end`."""
    lambda_end: NonNegativeFloat = 5.0
    """Smallest lambda."""


class SphereFaceR(ScaledLoss):
    """SphereFace-R (Liu et al. 2022): `s cos(min(m theta, pi))` for the target (version 1), or `s cos(theta / m)` for
    the others (version 2)."""

    name: Literal["sphereface_r"] = "sphereface_r"
    scale: PositiveFloat = 30.0
    """s"""
    margin: AngleFactor = 1.5
    """m, factor on the angle"""
    version: Literal[1, 2] = 1
    """1: m changes the target's angle; 2: the others'."""


class CosFace(ScaledLoss):
    """CosFace (Wang et al. 2018), AM-Softmax: `s (cos(theta) - m)`."""

    name: Literal["cosface"] = "cosface"
    margin: NonNegativeFloat = 0.4
    """m"""


class ArcFace(ScaledLoss):
    """ArcFace (Deng et al. 2019): `s cos(theta + m)`."""

    name: Literal["arcface"] = "arcface"
    margin: Angle = 0.5
    """m, in radians"""
    straight_through: bool = False
    """Whether to do as arcface_torch: no factor sin(theta + m) / sin(theta) in the gradient, no guard of theta + m."""


class Combined(ScaledLoss):
    """Combined margin (Deng et al. 2019): `s (cos(m1 theta + m2) - m3)`."""

    name: Literal["combined"] = "combined"
    m1: AngleFactor = 1.0
    """Factor on the angle."""
    m2: Angle = 0.5
    """Addition to the angle, in radians."""
    m3: NonNegativeFloat = 0.0
    """Subtraction from the cosine."""


class AdaFace(ScaledLoss):
    """AdaFace (Kim et al. 2022): an angular and an additive margin that follow the embedding's norm."""

    name: Literal["adaface"] = "adaface"
    margin: Angle = 0.4
    """m"""
    concentration: PositiveFloat = 0.333
    """h; norms within 1 / h standard deviations of the mean span the range of the margin."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch in the running mean and deviation of the norms."""


class MagFace(ScaledLoss):
    """MagFace (Meng et al. 2021): ArcFace with a margin that grows with the norm `a`, and a pull `g(a)` on the norm."""

    name: Literal["magface"] = "magface"
    lower_norm: PositiveFloat = 10.0
    """l_a; norms are clamped to [l_a, u_a]."""
    upper_norm: PositiveFloat = 110.0
    """u_a"""
    lower_margin: Angle = 0.45
    """Margin at l_a, in radians."""
    upper_margin: Angle = 0.8
    """Margin at u_a, in radians."""
    norm_weight: NonNegativeFloat = 35.0
    """lambda_g, weight of `g(a) = a / u_a^2 + 1 / a`."""

    @model_validator(mode="after")
    def _ordered(self) -> "MagFace":
        if self.lower_norm >= self.upper_norm or self.lower_margin > self.upper_margin:
            raise ValueError("lower_norm must be below upper_norm, and lower_margin not above upper_margin")
        return self


class ElasticFace(ScaledLoss):
    """ElasticFace (Boutros et al. 2022): each sample's margin is drawn from N(margin, deviation) anew in each step."""

    name: Literal["elasticface"] = "elasticface"
    base: Literal["arcface", "cosface"] = "arcface"
    """Target's margin, on the angle or on the cosine."""
    margin: Angle = 0.5
    """Mean of the margins."""
    deviation: NonNegativeFloat = 0.05
    """Standard deviation of the margins."""
    plus: bool = False
    """ElasticFace+: the larger a target's cosine within the batch, the smaller the margin that it gets."""


class AdaCos(Loss):
    """AdaCos (Zhang et al. 2019): `s cos(theta)` with a scale that is computed anew in each step."""

    name: Literal["adacos"] = "adacos"


class CurricularFace(ScaledLoss):
    """CurricularFace (Huang et al. 2020): ArcFace, and hard negatives `cos` become `cos (t + cos)` with a growing t."""

    name: Literal["curricularface"] = "curricularface"
    margin: Angle = 0.5
    """m, in radians"""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of a batch's mean target cosine in t."""


class MVSoftmax(ScaledLoss):
    """MV-Softmax (Wang et al. 2020): hard negatives `cos` become `w cos + w - 1`."""

    name: Literal["mv_softmax"] = "mv_softmax"
    scale: PositiveFloat = 32.0
    """s"""
    base: Literal["arcface", "cosface"] = "cosface"
    """Target's margin, on the angle or on the cosine; a negative beyond it is hard."""
    margin: Angle = 0.35
    """m"""
    weight: Annotated[float, Field(ge=1)] = 1.12
    """w"""


class Circle(ScaledLoss):
    """Circle loss with class weights (Sun et al. 2020): each cosine is weighted by how far it is from its optimum."""

    name: Literal["circle"] = "circle"
    scale: PositiveFloat = 256.0
    """gamma"""
    margin: Fraction = 0.25
    """m, relaxation"""


class SphereFace2(ScaledLoss):
    """SphereFace2 (Wen et al. 2022): a binary classification for each class, with a learned bias."""

    name: Literal["sphereface2"] = "sphereface2"
    scale: PositiveFloat = 40.0
    """r"""
    margin: NonNegativeFloat = 0.4
    """m"""
    exponent: PositiveFloat = 3.0
    """t, of `g(cos) = 2 ((cos + 1) / 2)^t - 1`"""
    balance: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """lambda, weight of the target's class; the others have 1 - lambda."""
    weight: PositiveFloat = 50.0
    """Factor on the whole loss, besides 1 / r."""


class UCE(ScaledLoss):
    """UniFace's unified cross-entropy (Zhou et al. 2023): a logistic loss for each class, with a learned bias."""

    name: Literal["uce"] = "uce"
    margin: NonNegativeFloat = 0.4
    """m"""


class Filter(Section):
    """Inter-class filtering (An et al. 2022): negatives that are too near are taken for the same person."""

    threshold: Annotated[float, Field(gt=-1, lt=1)]
    """Cosine beyond which a negative is filtered."""
    zero: bool = False
    """Whether its cosine counts as 0, as in arcface_torch, instead of being left out of the sum."""


class Center(Section):
    """Center loss (Wen et al. 2016): half the squared distance of an embedding from its class's centre."""

    weight: PositiveFloat = 0.003
    """lambda, factor on this loss beside the one over classes."""
    rate: Fraction = 0.5
    """alpha, fraction of the way to its embeddings that a centre moves in a step."""


class Triplet(Section):
    """Batch-hard triplet loss (Hermans et al. 2017) on Euclidean distances of unit-length embeddings.

    It needs several images of an identity in a batch: `data.images_per_identity`.
    """

    weight: PositiveFloat = 1.0
    """Factor on this loss beside the one over classes."""
    margin: NonNegativeFloat = 0.2
    """Distance by which the nearest impostor is to be further away than the furthest genuine image."""


class Contrastive(Section):
    """Contrastive loss (Hadsell et al. 2006) over all pairs of unit-length embeddings in a batch.

    It needs several images of an identity in a batch: `data.images_per_identity`.
    """

    weight: PositiveFloat = 1.0
    """Factor on this loss beside the one over classes."""
    margin: PositiveFloat = 1.0
    """Euclidean distance beyond which an impostor pair counts no more."""
