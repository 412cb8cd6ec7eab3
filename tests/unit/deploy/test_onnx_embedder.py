"""ONNX files as others write them."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recognition.deploy.onnx_embedder import OnnxEmbedder, OnnxOptions
from recognition.errors import UserError

SIZE = 8
FLOAT, HALF, DOUBLE, BYTE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8


def build(path, shape=("n", 3, SIZE, SIZE), kind=FLOAT, outputs=("mean",), opset=17, ir=8, extra=()):
    """A network whose embedding is each channel's mean; `outputs` may have its norm, and the same as [N, 3, 1, 1]."""
    axes = [1, 2] if shape[3] == 3 else [2, 3]
    work = FLOAT if kind == BYTE else kind
    cast = [helper.make_node("Cast", ["x"], ["y"], to=work)]
    made = {
        "mean": [helper.make_node("ReduceMean", ["y"], ["mean"], axes=axes, keepdims=0)],
        "again": [helper.make_node("Identity", ["mean"], ["again"])],
        "pooled": [helper.make_node("ReduceMean", ["y"], ["pooled"], axes=axes, keepdims=1)],
        "norm": [helper.make_node("ReduceL2", ["mean"], ["norm"], axes=[1], keepdims=1)],
        "flat": [helper.make_node("Flatten", ["mean"], ["flat"], axis=0)],
        "one": [
            helper.make_node("Constant", [], ["shape"], value=helper.make_tensor("s", TensorProto.INT64, [2], [1, 3])),
            helper.make_node("Reshape", ["mean", "shape"], ["one"]),
        ],
    }
    needed = list(dict.fromkeys([*(["mean"] if set(outputs) - {"pooled"} else []), *outputs]))
    nodes = [*cast, *(node for name in needed for node in made[name]), *extra]
    graph = helper.make_graph(
        nodes,
        "others",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, work, None) for name in outputs],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("org.odd", 1)]
    model = helper.make_model(graph, opset_imports=domains[: 1 + len(extra)], ir_version=ir)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(5).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)


def means(images, mean=127.5, std=127.5):
    return ((images.astype(np.float64) - mean) / std).mean(axis=(1, 2))


@pytest.mark.parametrize(
    ("options", "reading", "note"),
    [
        ({"kind": HALF}, OnnxOptions(), "the input is float16"),
        ({"kind": DOUBLE}, OnnxOptions(), "the input is float64"),
        ({"outputs": ("mean", "norm")}, OnnxOptions(), r"the embedding is output mean of mean \[1, 3\], norm \[1, 1\]"),
        ({"outputs": ("norm", "mean")}, OnnxOptions(), "the embedding is output mean"),
        ({"outputs": ("mean", "again")}, OnnxOptions(output="again"), "the embedding is output again"),
        ({"outputs": ("pooled",)}, OnnxOptions(), ""),
        ({"shape": ("n", SIZE, SIZE, 3)}, OnnxOptions(), "channels come last"),
        ({"shape": (4, SIZE, SIZE, 3), "kind": HALF}, OnnxOptions(), "channels come last"),
        ({"shape": (2, 3, SIZE, SIZE)}, OnnxOptions(), ""),
        ({"shape": (64, 3, SIZE, SIZE)}, OnnxOptions(), ""),
        ({"shape": ("n", 3, "h", "w")}, OnnxOptions(size=SIZE), ""),
        ({"shape": ("n", 3, None, SIZE)}, OnnxOptions(), ""),
        ({"shape": ("n", "h", "w", 3)}, OnnxOptions(size=SIZE), "channels come last"),
        ({"shape": ("n", "c", "h", "w")}, OnnxOptions(size=SIZE), ""),
        ({"outputs": ("one",)}, OnnxOptions(), "one image at a time"),
        ({"opset": 11}, OnnxOptions(), ""),
    ],
)
def test_other_peoples_files(tmp_path, images, options, reading, note):
    embedder = OnnxEmbedder(build(tmp_path / "model.onnx", **options), reading)
    found = embedder(images)
    assert (embedder.image_size, embedder.embedding_size, found.dtype) == (SIZE, 3, np.float32)
    near = 2e-3 if options.get("kind") == HALF else 1e-6
    np.testing.assert_allclose(found, means(images), atol=near)
    np.testing.assert_allclose(embedder(images[:1]), means(images)[:1], atol=near)
    assert embedder(images[:0]).shape == (0, 3)
    said = " ".join(embedder.notes)
    assert re.search(note, said)
    assert "the file does not say what it takes: RGB, (x - 127.5) / 127.5" in said


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (OnnxOptions(mean=[0], std=[255]), lambda images: means(images, 0, 255)),
        (OnnxOptions(bgr=True), lambda images: means(images)[:, ::-1]),
        (OnnxOptions(std=[128]), lambda images: means(images, std=128)),
        (
            OnnxOptions(mean=[104, 117, 123], std=[1, 2, 4], bgr=True),
            lambda images: means(images[..., ::-1], np.array([104, 117, 123]), np.array([1, 2, 4])),
        ),
    ],
)
@pytest.mark.parametrize("shape", [("n", 3, SIZE, SIZE), ("n", SIZE, SIZE, 3)])
def test_normalisation_of_others(tmp_path, images, reading, expected, shape):
    embedder = OnnxEmbedder(build(tmp_path / "model.onnx", shape), reading)
    np.testing.assert_allclose(embedder(images), expected(images), rtol=1e-5, atol=1e-5)


def test_levels_as_bytes_are_not_normalised(tmp_path, images):
    embedder = OnnxEmbedder(build(tmp_path / "model.onnx", kind=BYTE))
    np.testing.assert_allclose(embedder(images), means(images, 0, 1), rtol=1e-6)
    assert "levels 0 to 255" in " ".join(embedder.notes)


@pytest.mark.parametrize(
    ("options", "reading", "message"),
    [
        ({"shape": ("n", 3, "h", "w")}, OnnxOptions(), "any height and width .*--size 112"),
        ({"shape": ("n", 3, SIZE, 16)}, OnnxOptions(), "not a face embedder: it takes x .*not one input"),
        ({"shape": ("n", 1, SIZE, SIZE)}, OnnxOptions(), "not one input"),
        ({"shape": ("n", 3, SIZE, SIZE), "kind": TensorProto.INT64}, OnnxOptions(), r"int64.* not one input"),
        ({}, OnnxOptions(size=112), "takes images of 8 x 8 pixels only, not 112"),
        ({}, OnnxOptions(output="norm"), r"no output norm, but mean \[1, 3\]"),
        (
            {"outputs": ("mean", "again")},
            OnnxOptions(),
            r"which of its outputs .* mean \[1, 3\], again \[1, 3\].*--output mean",
        ),
        ({"outputs": ("mean", "norm")}, OnnxOptions(output="norm"), r"its output norm gives .*not one output \[N, D\]"),
        ({"outputs": ("norm",)}, OnnxOptions(), "not one output"),
        (
            {"opset": 99},
            OnnxOptions(),
            r"it is newer than ONNX Runtime \S+ reads \(ONNX Runtime only .*version_converter",
        ),
        ({"ir": 99}, OnnxOptions(), "newer than ONNX Runtime .*install a newer"),
        (
            {"extra": [helper.make_node("Odd", ["mean"], ["odd"], domain="org.odd")]},
            OnnxOptions(),
            "operator that ONNX Runtime",
        ),
    ],
)
def test_files_that_cannot_be_taken(tmp_path, options, reading, message):
    with pytest.raises(UserError, match=rf"model\.onnx: .*{message}"):
        OnnxEmbedder(build(tmp_path / "model.onnx", **options), reading)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>log in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"\x80\x04]q\x00.", "a pickle"),
        (b"not a model", "it is text"),
        (bytes(100), "zeros"),
        (b"\x08\x08\x12\x07pytorch\x1a", "export or download it again"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=rf"model\.onnx: ONNX Runtime cannot load it: .*{message}"):
        OnnxEmbedder(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="a folder, not an ONNX file"):
        OnnxEmbedder(tmp_path)


def test_weights_in_another_file_that_is_missing(tmp_path):
    weight = numpy_helper.from_array(np.ones((3, 400), np.float32), "w")
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", FLOAT, ["n", 3, SIZE, SIZE])
    y = helper.make_tensor_value_info("y", FLOAT, ["n", 400])
    model = helper.make_model(
        helper.make_graph(nodes, "outside", [x], [y], [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    assert OnnxEmbedder(tmp_path / "m.onnx").embedding_size == 400
    (tmp_path / "m.bin").unlink()
    with pytest.raises(UserError, match="a file that holds its weights is missing"):
        OnnxEmbedder(tmp_path / "m.onnx")
