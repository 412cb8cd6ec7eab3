"""Any timm model and the neck: shapes, precision, keys of randomness, weights, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from recognition.config import Backbone as BackboneConfig
from recognition.errors import UserError
from recognition.models.backbone import Backbone, BackboneEmbedder, Neck, build_backbone, seed_step


def small(**fields: Any) -> BackboneConfig:
    given: dict[str, Any] = {"name": "resnet10t", "image_size": 32, "embedding_size": 16, "neck": "pool"}
    return BackboneConfig(**given | fields)


def images(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


FAMILIES = {  # and the smallest image that leaves more than a few positions
    "resnet18": 32,
    "mobilenetv3_small_100": 64,
    "vit_tiny_patch16_224": 64,
    "convnext_atto": 64,
    "iresnet18": 32,
    "mobilefacenet": 32,
}
PART = 1e-2
"""Of the loss, by which a step changes it: a thousand times what float32 rounds off it, and too little to bend it."""


def family(name: str, precision: str) -> Backbone:
    return build_backbone(
        BackboneConfig(name=name, image_size=FAMILIES[name], embedding_size=32, precision=precision)  # type: ignore[arg-type]
    )


def distance(embeddings: torch.Tensor) -> torch.Tensor:
    """From a target: the sum of squares, in float64."""
    target = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    return (embeddings.double() - target).square().sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_learns(name: str) -> None:
    backbone, x = family(name, "float32"), images(8, FAMILIES[name])
    parameters: list[torch.Tensor] = [each for each in backbone.parameters() if each.requires_grad]
    before = distance(backbone(x))
    gradients = torch.autograd.grad(before, parameters)
    # Along the gradient the loss changes by its square for each unit of the way.
    way = PART * before.item() / sum(gradient.double().square().sum().item() for gradient in gradients)
    with torch.no_grad():
        torch._foreach_add_(parameters, gradients, alpha=-way)
        lower = distance(backbone(x))
        torch._foreach_add_(parameters, gradients, alpha=2 * way)
        higher = distance(backbone(x))
    assert lower < before < higher
    # What float32 rounds off the losses is 2e-4 of their difference at most, their third derivative 2e-3 (measured).
    assert (higher - lower).item() == pytest.approx(2 * PART * before.item(), rel=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_gets_gradients_in_bfloat16(name: str) -> None:
    backbone = family(name, "bfloat16")
    embeddings = backbone(images(4, FAMILIES[name]))
    assert embeddings.shape == (4, 32)
    assert embeddings.dtype == torch.float32
    distance(embeddings).backward()
    without = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


@pytest.mark.parametrize("kind", ["flatten", "pool", "linear"])
def test_neck_equals_its_formula(kind: str) -> None:
    neck = Neck(kind, channels=3, positions=4, size=5, dropout=0.0)
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (6, 3, 2, 2))

    def standardise(y: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        return (y - y.mean(axes, keepdims=True)) / np.sqrt(y.var(axes, keepdims=True) + 1e-5)

    y = x if kind == "linear" else standardise(x, (0, 2, 3))
    y = y.mean((2, 3)) if kind == "pool" else y.reshape(6, -1)
    expected = standardise(y @ neck.linear.weight.detach().numpy().astype(np.float64).T, (0,))
    actual = neck(torch.from_numpy(x).float())
    # Float32 against float64; dividing by the deviation of six samples may magnify 1e-6 by some tens.
    np.testing.assert_allclose(actual.detach().numpy(), expected, atol=1e-4)
    assert not neck.output_norm.weight.requires_grad


def test_neck_drops_out_only_in_training() -> None:
    neck = Neck("flatten", 3, 4, 5, dropout=0.5)
    x = torch.ones(4, 3, 2, 2)
    assert not torch.equal(neck.dropout(x), x)
    assert torch.equal(neck.eval().dropout(x), x)


def test_auto_neck_is_what_the_model_asks_for() -> None:
    assert isinstance(build_backbone(BackboneConfig(name="mobilefacenet")).neck.norm, torch.nn.Identity)
    neck = build_backbone(small(neck="auto")).neck
    assert isinstance(neck.norm, torch.nn.BatchNorm2d)
    assert not neck.pool


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("vit_tiny_patch16_224", lambda features: features[:, 1:].mean(1)),  # without the class token
        ("mambaout_femto", lambda features: features.mean((1, 2))),  # channels stand last
        ("resnet10t", lambda features: features.mean((2, 3))),
    ],
)
def test_layout_of_features(name: str, mean: Any) -> None:
    backbone = build_backbone(small(name=name, image_size=64, precision="float32")).eval()
    with torch.no_grad():
        expected = mean(backbone.trunk(images(2, 64))) @ backbone.neck.linear.weight.T / (1 + 1e-5)
        torch.testing.assert_close(backbone(images(2, 64)), expected)


def test_a_model_that_cannot_leave_its_pooling_out() -> None:
    backbone = build_backbone(small(name="efficientvit_b0", neck="auto"))
    assert backbone(images(2, 32)).shape == (2, 16)


def test_size_of_mobilefacenet_and_iresnet_follows_the_image() -> None:
    for name in ("mobilefacenet", "iresnet18"):
        assert build_backbone(small(name=name, image_size=40, neck="auto"))(images(2, 40)).shape == (2, 16)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = build_backbone(small(), seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected), "the caller's generator was touched"
    again, other = build_backbone(small(), seed=1).state_dict(), build_backbone(small(), seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["neck.linear.weight"], other["neck.linear.weight"])


def test_dropout_is_keyed_by_seed_step_and_rank() -> None:
    backbone = build_backbone(small(dropout=0.5, options={"drop_path_rate": 0.5}, precision="float32"))
    x = images(8, 32)

    def embed(*key: int) -> torch.Tensor:
        torch.rand(3)
        seed_step(*key)
        return backbone(x).detach()

    first = embed(1, 2, 3)
    assert torch.equal(first, embed(1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        assert not torch.equal(first, embed(*other))


def test_precision() -> None:
    x = images(4, 32)
    full = build_backbone(small(precision="float32"), seed=1).eval()
    mixed = build_backbone(small(precision="bfloat16"), seed=1).eval()
    with torch.no_grad():
        expected, actual = full(x), mixed(x)
        assert torch.equal(mixed(x, float32=True), expected)
    assert actual.dtype == torch.float32
    assert not torch.equal(actual, expected)
    # bfloat16 keeps 8 binary digits: 4e-3 a layer make 1e-2 in ten, and 1 - cosine half the square of it.
    assert functional.cosine_similarity(actual, expected).min() > 0.999
    types: list[torch.dtype] = []
    mixed.neck.linear.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(x)
    assert types == [torch.float32]


def test_memory_format_changes_no_value() -> None:
    x = images(4, 32)
    last = build_backbone(small(channels_last=True, precision="float32")).eval()
    first = build_backbone(small(channels_last=False, precision="float32")).eval()
    assert last.get_parameter("trunk.layer2.0.conv1.weight").is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        # The same sums in another order, through ten layers of float32.
        torch.testing.assert_close(last(x), first(x), rtol=1e-4, atol=1e-5)


def test_compile_leaves_the_state_dict_as_it_is() -> None:
    compiled, plain = build_backbone(small(compile=True)), build_backbone(small())
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert compiled.trunk._compiled_call_impl is not None


def test_embedder() -> None:
    backbone = build_backbone(small(precision="bfloat16"))
    faces = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    faces.setflags(write=False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    embedder = BackboneEmbedder(backbone, "cpu", float32=True)
    embeddings = embedder(faces)
    assert (embedder.image_size, embedder.embedding_size) == (32, 16)
    assert backbone.training
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    plain = ((faces.astype(np.float64) - 127.5) / 127.5).transpose(0, 3, 1, 2)
    backbone.eval()
    with torch.no_grad():
        expected = backbone(torch.from_numpy(plain).float(), float32=True).numpy()
        mixed = backbone(torch.from_numpy(plain).float()).numpy()
    # The pixels are divided in float64 here, which changes the last digit of some.
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(BackboneEmbedder(backbone)(faces), mixed)
    assert not backbone.training
    assert embedder(faces[:0]).shape == (0, 16)
    with pytest.raises(ValueError, match="uint8"):
        embedder(faces / 255)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"name": "iresnet51"}, "iresnet51; did you mean .*iresnet50"),
        ({"name": "resnet18.a1"}, "timm has no weights resnet18.a1, but a1_in1k, .*resnet18 alone will do"),
        ({"name": "resnet18t.a1_in1k"}, "no timm model resnet18t.a1_in1k; did you mean resnet18"),
        ({"name": "iresnet18", "options": {"pretrained": True}}, "pretrained: .*timm has none of iresnet18"),
        ({"freeze": ("layer1",)}, "no module layer1; did you mean trunk.layer1.*\n.* trunk.conv1, "),
        ({"freeze": ("trunk", "nek")}, "freeze: no module nek; did you mean neck"),
        ({"freeze": ("trunk.act1",)}, "freeze: trunk.act1 has no weights"),
        ({"options": {"drop_pth_rate": 0.1}}, "drop_pth_rate: .* did you mean drop_path_rate"),
        (
            {"name": "poolformer_s12", "options": {"drop_pth_rate": 0.1}},
            "drop_pth_rate: .* did you mean drop_path_rate",
        ),
        ({"name": "iresnet18", "options": {"drop": 0.1}}, "drop: iresnet18 has no such option"),
        ({"options": {"pretrained": True}}, "pretrained: .*backbone.weights"),
        ({"options": {"act_layer": "nonsense"}}, "resnet10t .*nonsense"),
        ({"name": "convnext_atto", "image_size": 16}, "convnext_atto .*16x16"),
        (
            {"name": "vit_tiny_patch16_224", "neck": "flatten", "options": {"patch_drop_rate": 0.3}},
            "patch_drop_rate: .*neck = 'pool'",
        ),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        build_backbone(small(**fields))
