"""The head's losses as their papers write them: one process, the whole weights, all logits, ordinary autograd, float64.

Nothing here may come from the head, which is held against it. Letters: c cosine, theta its angle, y the target's class,
s scale, m margin; [B, C] one number for each sample and class, [B] one for each sample.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import config

LOSSES: dict[str, config.Head] = {
    "softmax": config.Head(loss=config.Softmax()),
    "normface": config.Head(loss=config.NormFace(scale=30.0)),
    "sphereface": config.Head(loss=config.SphereFace()),
    # lambda 8, 4, 8/3, 2, 1.6, 4/3, 8/7, and 1 from step 7 on.
    "sphereface-annealing": config.Head(loss=config.SphereFace(lambda_start=8.0, lambda_decay=1.0, lambda_end=1.0)),
    "sphereface-unblended": config.Head(loss=config.SphereFace(margin=2.5, lambda_start=0.0, lambda_end=0.0)),
    "sphereface_r-1": config.Head(loss=config.SphereFaceR()),
    "sphereface_r-1-wide": config.Head(loss=config.SphereFaceR(margin=3.0)),
    "sphereface_r-2": config.Head(loss=config.SphereFaceR(version=2)),
    "cosface": config.Head(loss=config.CosFace()),
    "arcface": config.Head(loss=config.ArcFace()),
    "arcface-wide": config.Head(loss=config.ArcFace(scale=20.0, margin=2.0)),
    "arcface-straight-through": config.Head(loss=config.ArcFace(straight_through=True)),
    "arcface-scale-100": config.Head(loss=config.ArcFace(scale=100.0)),
    "arcface-scale-256": config.Head(loss=config.ArcFace(scale=256.0)),
    "combined": config.Head(loss=config.Combined(m1=1.0, m2=0.3, m3=0.2)),
    "combined-m1": config.Head(loss=config.Combined(scale=32.0, m1=1.6, m2=0.1, m3=0.1)),
    "adaface": config.Head(loss=config.AdaFace()),
    # The batch's own statistics; both ends of the norms' range are clipped.
    "adaface-of-the-batch": config.Head(loss=config.AdaFace(concentration=1.0, momentum=1.0)),
    # Angles beyond both ends are clipped too.
    "adaface-wide": config.Head(loss=config.AdaFace(scale=20.0, margin=1.5, concentration=2.0, momentum=0.5)),
    # Norms of a few units: all below l_a; most within; on both sides of a narrow range.
    "magface": config.Head(loss=config.MagFace()),
    "magface-within": config.Head(loss=config.MagFace(lower_norm=0.05, upper_norm=20.0, norm_weight=2.0)),
    "magface-narrow": config.Head(
        loss=config.MagFace(scale=20.0, lower_norm=1.0, upper_norm=2.5, lower_margin=0.2, upper_margin=2.0)
    ),
    "elasticface-arcface": config.Head(loss=config.ElasticFace()),
    "elasticface-arcface-plus": config.Head(loss=config.ElasticFace(deviation=0.2, plus=True)),
    "elasticface-cosface": config.Head(loss=config.ElasticFace(base="cosface", margin=0.35)),
    "elasticface-cosface-plus": config.Head(loss=config.ElasticFace(base="cosface", margin=0.35, plus=True)),
    "adacos": config.Head(loss=config.AdaCos()),
    "curricularface": config.Head(loss=config.CurricularFace()),
    "curricularface-late": config.Head(loss=config.CurricularFace(scale=20.0, momentum=1.0)),
    "mv_softmax-cosface": config.Head(loss=config.MVSoftmax()),
    "mv_softmax-arcface": config.Head(loss=config.MVSoftmax(base="arcface", margin=0.5, weight=1.3)),
    "mv_softmax-arcface-wide": config.Head(loss=config.MVSoftmax(base="arcface", margin=2.0)),
    "circle": config.Head(loss=config.Circle()),
    "circle-narrow": config.Head(loss=config.Circle(scale=32.0, margin=0.1)),
    "sphereface2": config.Head(loss=config.SphereFace2()),
    "sphereface2-balanced": config.Head(
        loss=config.SphereFace2(scale=20.0, margin=0.2, exponent=2.0, balance=0.5, weight=3.0)
    ),
    "uce": config.Head(loss=config.UCE()),
    "uce-small-scale": config.Head(loss=config.UCE(scale=10.0, margin=0.1)),
    "cosface-subcenters": config.Head(loss=config.CosFace(), subcenters=3),
    "arcface-subcenters": config.Head(loss=config.ArcFace(), subcenters=3),
    # At small scales, at which a cosine of 0 counts.
    "cosface-filter": config.Head(loss=config.CosFace(scale=8.0), filter=config.Filter(threshold=0.2)),
    "cosface-filter-zero": config.Head(loss=config.CosFace(scale=8.0), filter=config.Filter(threshold=0.2, zero=True)),
    "curricularface-filter": config.Head(loss=config.CurricularFace(scale=8.0), filter=config.Filter(threshold=0.2)),
    "curricularface-filter-zero": config.Head(
        loss=config.CurricularFace(scale=8.0), filter=config.Filter(threshold=0.2, zero=True)
    ),
    "adacos-filter": config.Head(loss=config.AdaCos(), filter=config.Filter(threshold=0.2)),
    "uce-filter": config.Head(loss=config.UCE(scale=10.0), filter=config.Filter(threshold=0.2)),
    "sphereface2-filter-zero": config.Head(loss=config.SphereFace2(), filter=config.Filter(threshold=0.2, zero=True)),
    "circle-subcenters-filter": config.Head(
        loss=config.Circle(scale=64.0), subcenters=2, filter=config.Filter(threshold=0.3)
    ),
}


def cos_of_sum(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """`cos(theta + m)`, and `c - m sin(m)` where theta + m is beyond pi; InsightFace's guard."""
    margin = torch.as_tensor(margin, dtype=cosine.dtype)
    angle = cosine.acos() + margin
    return torch.where(angle <= math.pi, angle.cos(), cosine - margin * margin.sin())


def falling_cos(angle: Tensor) -> Tensor:
    """psi of SphereFace: `(-1)^k cos(angle) - 2 k` with k the half turns in the angle."""
    half_turns = (angle.detach() / math.pi).floor()
    return (-1) ** half_turns * angle.cos() - 2 * half_turns


def ranked(margins: Tensor, target: Tensor) -> Tensor:
    """ElasticFace+: the k-th smallest margin for the sample with the k-th largest target cosine; [B]."""
    found = torch.empty_like(margins)
    found[target.detach().argsort(descending=True, stable=True)] = margins.sort().values
    return found


def distances(x: Tensor) -> Tensor:
    """Euclidean distances of unit-length embeddings, [B, B]; of equal ones 0 with gradient 0."""
    unit = F.normalize(x)
    squares = (unit[:, None] - unit[None]).square().sum(2)
    apart = squares > 0
    return torch.where(apart, squares, 1.0).sqrt() * apart


@dataclass
class DenseHead:
    """The whole head, K rows of each of C classes; its attributes are replaced or changed in place as training goes."""

    settings: config.Head
    weight: Tensor
    """[C K, D], the rows of a class in succession"""
    bias: Tensor | None = None
    """[C], the textbook softmax alone"""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Learned ones: `bias`, b of SphereFace2 and UCE."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Those that follow the batches: `mean` and `deviation` of AdaFace, `scale` of AdaCos, `t` of CurricularFace."""
    centers: Tensor | None = None
    """[C, D], of the center loss"""

    @staticmethod
    def initial(settings: config.Head, weight: Tensor, bias: Tensor | None = None) -> "DenseHead":
        """A head before its first step, with copies of these rows [C K, D]; the bias [C] is for the softmax alone."""
        loss, classes = settings.loss, len(weight) // settings.subcenters
        head = DenseHead(settings, weight.detach().double().clone().requires_grad_())
        if isinstance(loss, config.Softmax) and bias is not None:
            head.bias = bias.detach().double().clone().requires_grad_()
        match loss:
            case config.AdaFace():
                state = {"mean": 20.0, "deviation": 100.0}
            case config.AdaCos():
                state = {"scale": math.sqrt(2) * math.log(max(classes - 1, 2))}
            case config.CurricularFace():
                state = {"t": 0.0}
            case _:
                state = {}
        head.state = {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}
        match loss:
            case config.SphereFace2(scale=r, margin=m, exponent=t, balance=alpha):
                # One class has no negatives to balance.
                z = alpha / ((1 - alpha) * max(classes - 1, 1))
                g0 = 2 * 0.5**t - 1
                a_target, a_other = r * (g0 - m), r * (g0 + m)
                root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(a_target - a_other))
                b = math.log(2 * z) - a_other - math.log(1 - z + root)
                head.scalars["bias"] = torch.tensor(b, dtype=torch.float64, requires_grad=True)
            case config.UCE():
                b = math.log(10 * classes)
                head.scalars["bias"] = torch.tensor(b, dtype=torch.float64, requires_grad=True)
        if settings.center is not None:
            head.centers = torch.zeros(classes, weight.shape[1], dtype=torch.float64)
        return head

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        step: int = 0,
        margin_scale: float = 1.0,
        training: bool = True,
        margins: Tensor | None = None,
        taken: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over classes of embeddings x [B, D] with their labels [B], with MagFace's g.

        `training`: the state follows this batch first. `margins`: [B], what ElasticFace drew, before `margin_scale` and
        ranking. `taken`: sorted classes that take part; None: all.
        """
        weight, bias = self.weight.unflatten(0, (-1, self.settings.subcenters)), self.bias
        if taken is not None:
            weight, labels = weight[taken], torch.searchsorted(taken, labels)
            bias = None if bias is None else bias[taken]
        own = F.one_hot(labels, len(weight)).bool()
        if isinstance(self.settings.loss, config.Softmax):
            logits = x @ weight.squeeze(1).T
            logits = logits if bias is None else logits + bias
            return self._softmax(logits[own], logits, ~own)

        cosine = torch.einsum("bd,ckd->bck", F.normalize(x), F.normalize(weight, dim=2)).max(2).values
        # The angle of exactly 0 or pi has no gradient.
        cosine = cosine.clamp(-1 + 1e-12, 1 - 1e-12)
        target, others, counted = cosine[own], cosine, ~own
        if (filtering := self.settings.filter) is not None:
            near = cosine.detach() > filtering.threshold
            others = others.masked_fill(near, 0.0) if filtering.zero else others
            counted = counted if filtering.zero else counted & ~near
        if training:
            with torch.no_grad():
                self._follow(x, target, others, counted)

        match self.settings.loss:
            case config.SphereFace2(scale=r, balance=balance, weight=factor):
                genuine, impostors = self._binary(target, others, counted, margin_scale)
                return (factor / r * (balance * genuine + (1 - balance) * impostors)).mean()
            case config.UCE():
                genuine, impostors = self._binary(target, others, counted, margin_scale)
                return (genuine + impostors).mean()
            case config.ElasticFace(plus=plus):
                assert margins is not None, "ElasticFace needs the margins that were drawn"
                margins = ranked(margins, target) if plus else margins
        mean = self._softmax(*self._logits(target, others, x.norm(dim=1), step, margin_scale, margins), counted)
        if isinstance(self.settings.loss, config.MagFace):
            a = x.norm(dim=1).clamp(self.settings.loss.lower_norm, self.settings.loss.upper_norm)
            g = a / self.settings.loss.upper_norm**2 + 1 / a
            mean = mean + self.settings.loss.norm_weight * g.mean()
        return mean

    def auxiliary(self, x: Tensor, labels: Tensor) -> Tensor:
        """Weighted sum of the losses on embeddings x [B, D] and their labels [B]: center, triplet and contrastive."""
        total = x.new_zeros(())
        same = labels[:, None] == labels
        if (center := self.settings.center) is not None:
            assert self.centers is not None
            total = total + center.weight / 2 * (x - self.centers[labels]).square().sum(1).mean()
        if (triplet := self.settings.triplet) is not None:
            apart = distances(x)
            genuine = same & ~torch.eye(len(x), dtype=torch.bool)
            furthest = apart.masked_fill(~genuine, -torch.inf).max(1).values
            nearest = apart.masked_fill(same, torch.inf).min(1).values
            both = genuine.any(1) & ~same.all(1)
            if both.any():
                total = total + triplet.weight * (triplet.margin + furthest[both] - nearest[both]).relu().mean()
        if (contrastive := self.settings.contrastive) is not None:
            apart = distances(x)
            once = torch.ones_like(same).triu(1)
            if (once & same).any():
                total = total + contrastive.weight * apart[once & same].square().mean()
            if (once & ~same).any():
                total = total + contrastive.weight * (contrastive.margin - apart[once & ~same]).relu().square().mean()
        return total

    def move_centers(self, x: Tensor, labels: Tensor) -> None:
        """Wen et al. 2016: `delta_j = sum_i [y_i = j] (c_j - x_i) / (1 + n_j)`, `c_j -= alpha delta_j`."""
        assert self.settings.center is not None
        assert self.centers is not None
        own = F.one_hot(labels, len(self.centers)).to(x.dtype)
        difference = self.centers[None] - x.detach()[:, None]
        delta = (own[:, :, None] * difference).sum(0) / (1 + own.sum(0))[:, None]
        self.centers = self.centers - self.settings.center.rate * delta

    def _follow(self, x: Tensor, target: Tensor, others: Tensor, counted: Tensor) -> None:
        """Bring the state up to this batch: target cosines [B], and cosines [B, C] of which some count as negatives."""
        match self.settings.loss:
            case config.AdaFace(momentum=momentum):
                norm = x.norm(dim=1).clamp(0.001, 100)
                self.state["mean"] = (1 - momentum) * self.state["mean"] + momentum * norm.mean()
                if len(x) > 1:
                    deviation = norm.std(correction=1)
                    self.state["deviation"] = (1 - momentum) * self.state["deviation"] + momentum * deviation
            case config.AdaCos():
                average = (self.state["scale"] * others).exp().masked_fill(~counted, 0.0).sum(1).mean()
                angle = target.acos().median().clamp(max=math.pi / 4)
                scale = average.log() / angle.cos()
                if scale.isfinite() and scale > 0:
                    self.state["scale"] = scale
            case config.CurricularFace(momentum=momentum):
                self.state["t"] = momentum * target.mean() + (1 - momentum) * self.state["t"]

    def _logits(
        self, target: Tensor, others: Tensor, norm: Tensor, step: int, margin_scale: float, margins: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B] of the targets and [B, C] of all classes as negatives, from cosines and norms [B]."""
        match self.settings.loss:
            case config.NormFace(scale=s):
                return s * target, s * others
            case config.SphereFace(margin=m, lambda_start=start, lambda_decay=decay, lambda_end=end):
                blend = max(end, start / (1 + decay * step))
                psi = falling_cos((1 + margin_scale * (m - 1)) * target.acos())
                return norm * (target + (psi - target) / (1 + blend)), norm[:, None] * others
            case config.SphereFaceR(scale=s, margin=m, version=1):
                return s * ((1 + margin_scale * (m - 1)) * target.acos()).clamp(max=math.pi).cos(), s * others
            case config.SphereFaceR(scale=s, margin=m):
                return s * target, s * (others.acos() / (1 + margin_scale * (m - 1))).cos()
            case config.CosFace(scale=s, margin=m):
                return s * (target - margin_scale * m), s * others
            case config.ArcFace(scale=s, margin=m, straight_through=True):
                moved = (target.acos() + margin_scale * m).cos()
                return s * (target + (moved - target).detach()), s * others
            case config.ArcFace(scale=s, margin=m):
                return s * cos_of_sum(target, margin_scale * m), s * others
            case config.Combined(scale=s, m1=m1, m2=m2, m3=m3):
                angle = (1 + margin_scale * (m1 - 1)) * target.acos() + margin_scale * m2
                return s * (falling_cos(angle) - margin_scale * m3), s * others
            case config.AdaFace(scale=s, margin=m, concentration=h):
                m *= margin_scale
                deviation = norm.detach().clamp(0.001, 100) - self.state["mean"]
                z = (deviation / (self.state["deviation"] + 1e-3) * h).clamp(-1, 1)
                angle = (target.acos() - m * z).clamp(1e-3, math.pi - 1e-3)
                return s * (angle.cos() - (m + m * z)), s * others
            case config.MagFace(scale=s, lower_norm=lower, upper_norm=upper, lower_margin=least, upper_margin=most):
                slope = (most - least) / (upper - lower)
                margins = slope * (norm.clamp(lower, upper) - lower) + least
                return s * cos_of_sum(target, margin_scale * margins), s * others
            case config.ElasticFace(scale=s, base=base):
                assert margins is not None
                moved = (
                    cos_of_sum(target, margin_scale * margins) if base == "arcface" else target - margin_scale * margins
                )
                return s * moved, s * others
            case config.AdaCos():
                return self.state["scale"] * target, self.state["scale"] * others
            case config.CurricularFace(scale=s, margin=m):
                m *= margin_scale
                hard = others > (target.acos() + m).cos().detach()[:, None]
                return s * cos_of_sum(target, m), s * torch.where(hard, others * (self.state["t"] + others), others)
            case config.MVSoftmax(scale=s, base=base, margin=m, weight=w):
                m *= margin_scale
                moved = cos_of_sum(target, m) if base == "arcface" else target - m
                return s * moved, s * torch.where(others > moved.detach()[:, None], w * others + w - 1, others)
            case config.Circle(scale=gamma, margin=m):
                alpha_p, alpha_n = (1 + m - target).relu().detach(), (others + m).relu().detach()
                return gamma * alpha_p * (target - (1 - m)), gamma * alpha_n * (others - m)
        raise AssertionError(self.settings.loss)

    def _binary(self, target: Tensor, others: Tensor, counted: Tensor, margin_scale: float) -> tuple[Tensor, Tensor]:
        """Logistic losses [B] of the target's class, and summed over the negatives that count."""
        b = self.scalars["bias"]
        match self.settings.loss:
            case config.SphereFace2(scale=r, margin=m, exponent=t):
                g_target, g_others = (2 * ((c + 1) / 2) ** t - 1 for c in (target, others))
                positive, negative = r * (g_target - margin_scale * m) + b, r * (g_others + margin_scale * m) + b
            case config.UCE(scale=s, margin=m):
                positive, negative = s * (target - margin_scale * m) - b, s * others - b
            case _:
                raise AssertionError(self.settings.loss)
        return F.softplus(-positive), F.softplus(negative).masked_fill(~counted, 0.0).sum(1)

    def _softmax(self, target: Tensor, others: Tensor, counted: Tensor) -> Tensor:
        """Mean cross-entropy of target logits [B] among those of the negatives [B, C] that count."""
        negatives = others.masked_fill(~counted, -torch.inf)
        return (torch.cat([target[:, None], negatives], 1).logsumexp(1) - target).mean()
