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
    """Scale s, factor on the cosines."""


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
    """Margin m, factor on the target's angle."""
    lambda_start: NonNegativeFloat = 1000.0
    """Weight lambda of the plain cosine in the first step."""
    lambda_decay: NonNegativeFloat = 0.12
    """Speed of the annealing: lambda is `lambda_start / (1 + lambda_decay step)`, but at least `lambda_end`."""
    lambda_end: NonNegativeFloat = 5.0
    """Smallest lambda; the margin is fully in force at 0."""


class SphereFaceR(ScaledLoss):
    """SphereFace-R (Liu et al. 2022): `s cos(min(m theta, pi))` for the target (version 1), or `s cos(theta / m)` for
    the others (version 2)."""

    name: Literal["sphereface_r"] = "sphereface_r"
    scale: PositiveFloat = 30.0
    """Scale s, factor on the cosines."""
    margin: AngleFactor = 1.5
    """Margin m, factor on the angle."""
    version: Literal[1, 2] = 1
    """Place of the margin: 1 multiplies the target's angle by m, 2 divides the others' angles by m."""


class CosFace(ScaledLoss):
    """CosFace (Wang et al. 2018), AM-Softmax: `s (cos(theta) - m)`."""

    name: Literal["cosface"] = "cosface"
    margin: NonNegativeFloat = 0.4
    """Margin m, subtracted from the target's cosine; 0.35 to 0.4 for large data."""


class ArcFace(ScaledLoss):
    """ArcFace (Deng et al. 2019): `s cos(theta + m)`."""

    name: Literal["arcface"] = "arcface"
    margin: Angle = 0.5
    """Margin m, added to the target's angle, in radians. Lower it for noisy data."""
    straight_through: bool = False
    """Whether to train as arcface_torch: the gradient without the factor sin(theta + m) / sin(theta), and no limit
    on theta + m. Default: the true gradient."""


class Combined(ScaledLoss):
    """Combined margin (Deng et al. 2019): `s (cos(m1 theta + m2) - m3)`."""

    name: Literal["combined"] = "combined"
    m1: AngleFactor = 1.0
    """Margin m1, factor on the target's angle."""
    m2: Angle = 0.5
    """Margin m2, added to the target's angle, in radians."""
    m3: NonNegativeFloat = 0.0
    """Margin m3, subtracted from the target's cosine."""


class AdaFace(ScaledLoss):
    """AdaFace (Kim et al. 2022): an angular and an additive margin that follow the embedding's norm."""

    name: Literal["adaface"] = "adaface"
    margin: Angle = 0.4
    """Margin m, in radians on the angle and as a difference of cosines."""
    concentration: PositiveFloat = 0.333
    """Concentration h: norms within 1 / h standard deviations of the mean span the range of the margin."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of the current batch in the running mean and standard deviation of the norms."""


class MagFace(ScaledLoss):
    """MagFace (Meng et al. 2021): ArcFace with a margin that grows with the norm `a`, and a pull `g(a)` on the norm."""

    name: Literal["magface"] = "magface"
    lower_norm: PositiveFloat = 10.0
    """Smallest norm l_a; smaller norms count as l_a."""
    upper_norm: PositiveFloat = 110.0
    """Largest norm u_a; larger norms count as u_a."""
    lower_margin: Angle = 0.45
    """Margin at the norm l_a, in radians."""
    upper_margin: Angle = 0.8
    """Margin at the norm u_a, in radians."""
    norm_weight: NonNegativeFloat = 35.0
    """Weight lambda_g of the term `g(a) = a / u_a^2 + 1 / a`, which favours large norms."""

    @model_validator(mode="after")
    def _ordered(self) -> "MagFace":
        if self.lower_norm >= self.upper_norm or self.lower_margin > self.upper_margin:
            raise ValueError("lower_norm must be below upper_norm, and lower_margin not above upper_margin")
        return self


class ElasticFace(ScaledLoss):
    """ElasticFace (Boutros et al. 2022): each sample's margin is drawn from N(margin, deviation) anew in each step."""

    name: Literal["elasticface"] = "elasticface"
    base: Literal["arcface", "cosface"] = "arcface"
    """Margin on the target's angle (`arcface`) or on its cosine (`cosface`)."""
    margin: Angle = 0.5
    """Mean of the margins, in radians for `arcface`, as a difference of cosines for `cosface`."""
    deviation: NonNegativeFloat = 0.05
    """Standard deviation of the margins, in the units of `margin`."""
    plus: bool = False
    """Whether margins are sorted (ElasticFace+): the larger the target's cosine within the batch, the smaller its
    margin."""


class AdaCos(Loss):
    """AdaCos (Zhang et al. 2019): `s cos(theta)` with a scale that is computed anew in each step."""

    name: Literal["adacos"] = "adacos"


class CurricularFace(ScaledLoss):
    """CurricularFace (Huang et al. 2020): ArcFace, and hard negatives `cos` become `cos (t + cos)` with a growing t."""

    name: Literal["curricularface"] = "curricularface"
    margin: Angle = 0.5
    """Margin m, added to the target's angle, in radians."""
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Weight of the current batch in t, the running mean of the target's cosine."""


class MVSoftmax(ScaledLoss):
    """MV-Softmax (Wang et al. 2020): hard negatives `cos` become `w cos + w - 1`."""

    name: Literal["mv_softmax"] = "mv_softmax"
    scale: PositiveFloat = 32.0
    """Scale s, factor on the cosines."""
    base: Literal["arcface", "cosface"] = "cosface"
    """Margin on the target's angle (`arcface`) or on its cosine (`cosface`); negatives above the target with its
    margin are hard."""
    margin: Angle = 0.35
    """Margin m, in radians for `arcface`, as a difference of cosines for `cosface`."""
    weight: Annotated[float, Field(ge=1)] = 1.12
    """Weight w of hard negatives; 1 treats them as any other."""


class Circle(ScaledLoss):
    """Circle loss with class weights (Sun et al. 2020): each cosine is weighted by how far it is from its optimum."""

    name: Literal["circle"] = "circle"
    scale: PositiveFloat = 256.0
    """Scale gamma, factor on the weighted cosines."""
    margin: Fraction = 0.25
    """Relaxation m: the target's cosine should exceed 1 - m, and the others' stay below m."""


class SphereFace2(ScaledLoss):
    """SphereFace2 (Wen et al. 2022): a binary classification for each class, with a learned bias."""

    name: Literal["sphereface2"] = "sphereface2"
    scale: PositiveFloat = 40.0
    """Scale r, factor on the cosines."""
    margin: NonNegativeFloat = 0.4
    """Margin m, on the cosine."""
    exponent: PositiveFloat = 3.0
    """Exponent t of the similarity `g(cos) = 2 ((cos + 1) / 2)^t - 1`."""
    balance: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Weight lambda of the target's class; each other class has 1 - lambda."""
    weight: PositiveFloat = 50.0
    """Factor on the whole loss, in addition to 1 / r."""


class UCE(ScaledLoss):
    """UniFace's unified cross-entropy (Zhou et al. 2023): a logistic loss for each class, with a learned bias."""

    name: Literal["uce"] = "uce"
    margin: NonNegativeFloat = 0.4
    """Margin m, subtracted from the target's cosine."""


class Filter(Section):
    """Inter-class filtering (An et al. 2022): negatives that are too near are taken for the same person."""

    threshold: Annotated[float, Field(gt=-1, lt=1)]
    """Cosine above which a negative is filtered; 0.4 is usual."""
    zero: bool = False
    """Whether a filtered negative counts with a cosine of 0, as in arcface_torch. Default: it is left out of the
    sum."""


class Center(Section):
    """Center loss (Wen et al. 2016): half the squared distance of an embedding from its class's centre."""

    weight: PositiveFloat = 0.003
    """Weight lambda of this loss relative to the loss over the classes."""
    rate: Fraction = 0.5
    """Fraction alpha of the distance to its embeddings by which a centre moves in an update."""


class Triplet(Section):
    """Batch-hard triplet loss (Hermans et al. 2017) on Euclidean distances of unit-length embeddings.

    It needs several images of an identity in a batch: `data.images_per_identity`.
    """

    weight: PositiveFloat = 1.0
    """Weight of this loss relative to the loss over the classes."""
    margin: NonNegativeFloat = 0.2
    """Euclidean distance by which the nearest impostor should be further away than the furthest genuine image."""


class Contrastive(Section):
    """Contrastive loss (Hadsell et al. 2006) over all pairs of unit-length embeddings in a batch.

    It needs several images of an identity in a batch: `data.images_per_identity`.
    """

    weight: PositiveFloat = 1.0
    """Weight of this loss relative to the loss over the classes."""
    margin: PositiveFloat = 1.0
    """Euclidean distance from which on an impostor pair adds nothing to the loss."""
