import copy
import hashlib
import json
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from recognition.config import Backbone, Export
from recognition.deploy.export import check_export, export_onnx
from recognition.deploy.onnx_embedder import OnnxEmbedder
from recognition.errors import UserError
from recognition.models.backbone import BackboneEmbedder, build_backbone

SIZE, D = 16, 8
NEAR = 1e-5
"""Of embeddings of about 1: ONNX Runtime's float32 against float64, through sums of some hundred numbers."""


class Small(nn.Module):
    """A backbone in miniature, with all that an export has to undo: bfloat16, running statistics, dropout."""

    image_size = SIZE
    embedding_size = D

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(6 * (SIZE // 2) ** 2, D)
        self.last = nn.BatchNorm1d(D)

    def forward(self, images, *, float32=False):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=not float32):
            x = self.linear(self.dropout(self.norm(self.conv(images)).relu()).flatten(1))
        return self.last(x.float())


def small():
    torch.manual_seed(0)
    backbone = Small()
    for _ in range(3):
        backbone(2 * torch.randn(8, 3, SIZE, SIZE) + 0.3)
    backbone.compile()  # takes effect with the next call, which is not made: an export has to pass it by
    return backbone.train()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The backbone, its state before the export, the path and the parity."""
    backbone = small()
    before = copy.deepcopy(backbone.state_dict())
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    parity = export_onnx(backbone, path, {"backbone": "small", "step": 7, "margin": {"m": 0.5}}, Export())
    return backbone, before, path, parity


def reference(backbone, images):
    """Embeddings in float64 of uint8 images, from the layers' formulas."""
    state = {name: tensor.double().numpy() for name, tensor in backbone.state_dict().items()}
    x = (images.astype(np.float64).transpose(0, 3, 1, 2) - 127.5) / 127.5
    weight, bias = (torch.from_numpy(state[f"conv.{name}"]) for name in ("weight", "bias"))
    x = torch.nn.functional.conv2d(torch.from_numpy(x), weight, bias, 2, 1).numpy()

    def norm(x, name):
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, var, gain, bias = (
            state[f"{name}.{part}"].reshape(shape) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * gain + bias

    x = np.maximum(norm(x, "norm"), 0).reshape(len(x), -1)
    return norm(x @ state["linear.weight"].T + state["linear.bias"], "last")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (7, SIZE, SIZE, 3), np.uint8)


def test_the_file_computes_the_backbone_in_eval_mode_and_float32(exported, images):
    backbone, _, path, parity = exported
    expected = reference(backbone, images)
    embedder = OnnxEmbedder(path)
    assert (embedder.image_size, embedder.embedding_size) == (SIZE, D)
    for batch in (1, 2, 7):
        found = embedder(images[:batch])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:batch], atol=NEAR)
    assert embedder(images[:0]).shape == (0, D)
    assert 0 <= parity.max_difference < NEAR
    # A cosine differs from 1 by half the square of the error.
    assert 1 - 1e-6 < parity.min_cosine <= 1 + 1e-9


def test_the_backbone_is_left_as_it_is(exported):
    backbone, before, _, _ = exported
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_file_is_one_and_meets_insightfaces_loader(exported):
    _, _, path, _ = exported
    assert sorted(item.name for item in path.parent.iterdir()) == ["model.json", "model.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [item.version for item in model.opset_import if not item.domain] == [18]
    (data,), (embedding,) = model.graph.input, model.graph.output
    assert (data.name, embedding.name) == ("data", "embedding")
    assert data.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    batch, *rest = data.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [dimension.dim_value for dimension in rest] == [3, SIZE, SIZE]
    batch, length = embedding.type.tensor_type.shape.dim
    assert batch.dim_param
    assert length.dim_value == D
    names = [node.name for node in model.graph.node]
    assert not any(name.startswith(("Sub", "_minus", "Mul", "_mul")) for name in names)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)


def test_metadata_and_card(exported):
    _, _, path, parity = exported
    facts = OnnxEmbedder(path).metadata
    assert facts["input_color"] == "RGB"
    assert (float(facts["input_mean"]), float(facts["input_std"])) == (127.5, 127.5)
    assert (facts["backbone"], facts["step"], json.loads(facts["margin"])) == ("small", "7", {"m": 0.5})
    card = json.loads(path.with_suffix(".json").read_text())
    assert (card["input_size"], card["embedding_size"], card["input_layout"]) == (SIZE, D, "NCHW")
    assert (card["backbone"], card["step"], card["margin"], card["opset"]) == ("small", 7, {"m": 0.5}, 18)
    assert card["parity"] == {"max_difference": parity.max_difference, "min_cosine": parity.min_cosine}
    assert card["bytes"] == path.stat().st_size
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


class Doubtful(nn.Module):
    """Computes another thing when it is exported."""

    image_size = SIZE
    embedding_size = 3

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, images):
        wrong = self.error if torch.compiler.is_exporting() else 0.0
        return images.mean(dim=(2, 3)) + wrong * images[:, [0], 0, 0]


@pytest.mark.parametrize("error", [0.05, float("nan")])
def test_beyond_tolerance_leaves_no_file(tmp_path, error):
    with pytest.raises(UserError, match=r"model\.onnx: not written, .*export\.max_difference"):
        export_onnx(Doubtful(error), tmp_path / "model.onnx", {}, Export())
    assert not list(tmp_path.iterdir())


def test_facts_do_not_overwrite_the_preprocessing(tmp_path):
    with pytest.raises(ValueError, match="input_mean"):
        export_onnx(Doubtful(0.0), tmp_path / "model.onnx", {"input_mean": "0"}, Export())


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, images: images.reshape(2, -1)[:, :3],
        lambda self, images: images[:, :, 0, 0] if images.sum() > 0 else images[:, :, 1, 1],
    ],
)
def test_a_network_that_cannot_be_exported_is_refused(tmp_path, monkeypatch, forward):
    monkeypatch.setattr(Doubtful, "forward", forward)
    with pytest.raises(UserError, match="the backbone cannot be exported to ONNX: "):
        export_onnx(Doubtful(0.0), tmp_path / "model.onnx", {}, Export())


def test_a_network_beyond_protobufs_limit_is_refused(tmp_path):
    class Large(Doubtful):
        def __init__(self):
            super().__init__(0.0)
            with torch.device("meta"):
                self.weight = nn.Parameter(torch.empty(2**29))

        def __deepcopy__(self, memo):
            return self

        def cpu(self):
            return self

    with pytest.raises(UserError, match="2 GiB"):
        export_onnx(Large(), tmp_path / "model.onnx", {}, Export())


def foreign(path, *, shape=("n", 3, SIZE, SIZE), names=("a", "b"), static_batch=None):
    """A file as others write it: the mean over the pixels of (x - 1) * 2, without metadata."""
    one, two = (
        onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [1], [value]) for name, value in (("o", 1), ("t", 2))
    )
    nodes = [
        onnx.helper.make_node("Sub", ["x", "o"], ["s"], names[0]),
        onnx.helper.make_node("Mul", ["s", "t"], ["m"], names[1]),
        onnx.helper.make_node("ReduceMean", ["m"], ["y"], axes=[2, 3], keepdims=0),
    ]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [static_batch or "n", 3])
    graph = onnx.helper.make_graph(nodes, "foreign", [x], [y], [one, two])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("names", "mean", "std"), [(("a", "b"), 127.5, 127.5), (("Sub_1", "Mul_1"), 0, 1), (("Sub_1", "b"), 127.5, 127.5)]
)
@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_files_without_metadata_follow_insightfaces_rule(tmp_path, images, names, mean, std, batch):
    path = foreign(tmp_path / "foreign.onnx", names=names, shape=(batch, 3, SIZE, SIZE), static_batch=batch)
    expected = ((images.astype(np.float64) - mean) / std - 1).mean(axis=(1, 2)) * 2
    np.testing.assert_allclose(OnnxEmbedder(path)(images), expected, rtol=1e-4, atol=1e-5)


def test_metadata_says_how_pixels_are_normalised(tmp_path, images):
    path = foreign(tmp_path / "foreign.onnx")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"input_mean": "10", "input_std": "4.5", "input_color": "BGR"})
    onnx.save(model, path)
    expected = (((images - 10.0) / 4.5 - 1).mean(axis=(1, 2)) * 2)[:, ::-1]
    np.testing.assert_allclose(OnnxEmbedder(path)(images), expected, rtol=1e-4, atol=1e-5)


def test_an_output_batch_of_one_that_is_not_true_does_no_harm(tmp_path, images, capfd):
    embedder = OnnxEmbedder(foreign(tmp_path / "foreign.onnx", static_batch=1))
    assert embedder(images).shape == (7, 3)
    assert capfd.readouterr() == ("", "")


def test_missing_and_corrupt_files(tmp_path, exported):
    with pytest.raises(UserError, match="no such file"):
        OnnxEmbedder(tmp_path / "none.onnx")
    content = exported[2].read_bytes()
    for broken in (b"", b"not a model", content[: len(content) // 2]):
        (tmp_path / "broken.onnx").write_bytes(broken)
        with pytest.raises(UserError, match=r"broken\.onnx: ONNX Runtime cannot load it"):
            OnnxEmbedder(tmp_path / "broken.onnx")


def test_images_of_another_kind_are_refused(exported):
    embedder = OnnxEmbedder(exported[2])
    for images in (np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)):
        with pytest.raises(ValueError, match="takes uint8"):
            embedder(images)


def test_a_real_backbone_in_bfloat16_at_another_opset(tmp_path, images):
    settings = Backbone(name="test_resnet", image_size=32, embedding_size=12, precision="bfloat16")
    backbone = build_backbone(settings, seed=3)
    images = np.tile(images, (1, 2, 2, 1))
    backbone(torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 100)
    parity = export_onnx(backbone, tmp_path / "model.onnx", {}, Export(opset=17))
    model = onnx.load(tmp_path / "model.onnx")
    assert [item.version for item in model.opset_import if not item.domain] == [17]
    assert onnx.TensorProto.BFLOAT16 not in {tensor.data_type for tensor in model.graph.initializer}
    expected = BackboneEmbedder(backbone, float32=True)(images)
    # Float32 on both sides, through a few layers whose sums are in another order.
    np.testing.assert_allclose(OnnxEmbedder(tmp_path / "model.onnx")(images), expected, rtol=1e-4, atol=1e-4)
    assert parity.max_difference < NEAR


@pytest.mark.parametrize(
    ("name", "options", "opset", "ir_version"),
    [
        ("iresnet18", {}, 11, 6),
        ("mobilefacenet", {}, 12, 7),
        ("test_resnet", {}, 16, 8),
        ("vit_tiny_patch16_224", {"depth": 1}, 11, 6),
        ("convnext_atto", {}, 13, 7),
    ],
)
def test_older_opsets(name, options, opset, ir_version, tmp_path):
    settings = Backbone(name=name, options=options, image_size=32, embedding_size=12, precision="float32")
    backbone = build_backbone(settings, seed=3)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    backbone(torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 127.5 - 1)
    export_onnx(backbone, tmp_path / "model.onnx", {}, Export(opset=opset))
    model = onnx.load(tmp_path / "model.onnx")
    assert [item.version for item in model.opset_import] == [opset]
    assert model.ir_version == ir_version  # of ONNX's table, by which readers of that time know what they can read
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    embedder = OnnxEmbedder(tmp_path / "model.onnx")
    expected = BackboneEmbedder(backbone, float32=True)(images)
    for batch in (1, 6):
        found = embedder(images[:batch])
        # Float32 on both sides, whose sums are in another order.
        assert np.abs(found - expected[:batch]).max() < 1e-4 * np.linalg.norm(expected, axis=1).max()


class More(Small):
    """Has a step that not every opset can write."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, images, *, float32=False):
        return super().forward(images, float32=float32) + self.operator(images)


def test_an_opset_that_is_too_low_is_refused_before_training_with_the_lowest_that_works(capfd):
    sampling = More(
        lambda x: nn.functional.grid_sample(x, x[:, :2, :2, :4].permute(0, 2, 3, 1), align_corners=False)[:, 0].flatten(
            1
        )
    )
    with pytest.raises(UserError, match=r"at opset 11: .*grid_sampler.*; set export\.opset=16 "):
        check_export(sampling, Export(opset=11))
    check_export(sampling, Export(opset=16))
    assert capfd.readouterr().out == ""  # the older exporter prints its whole graph where it fails
    with pytest.raises(UserError, match=r"at opset 99: "):
        check_export(small(), Export(opset=99))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named_before_training(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    for attempt in (
        lambda: check_export(small(), Export()),
        lambda: export_onnx(small(), tmp_path / "x.onnx", {}, Export()),
    ):
        with pytest.raises(UserError, match=f"pip install {package}, or set export.enabled=false"):
            attempt()
