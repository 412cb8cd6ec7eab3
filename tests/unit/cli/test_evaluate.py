import importlib.util
import io
import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from recognition.evaluation.pairs import read_pairs
from recognition.evaluation.verification import verify

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture(scope="module")
def main():
    specification = importlib.util.spec_from_file_location("evaluate_tool", TOOLS / "evaluate.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


@pytest.fixture
def model(tmp_path):
    """An ONNX file whose embedding is the mean colour of each of 4 x 4 blocks, as (x - 127.5) / 127.5 gives it."""
    path = tmp_path / "run" / "model.onnx"
    path.parent.mkdir()
    nodes = [
        onnx.helper.make_node("AveragePool", ["data"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        onnx.helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    data, embedding = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("data", ["n", 3, 16, 16]), ("embedding", ["n", 48]))
    )
    graph = onnx.helper.make_graph(nodes, "blocks", [data], [embedding])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def blocks(images):
    """What the model gives, plus what it gives for the mirror image, in float64."""
    x = (np.asarray(images, np.float64) - 127.5) / 127.5
    pooled = x.reshape(len(x), 4, 4, 4, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    return (pooled + pooled[..., ::-1]).reshape(len(x), -1)


@pytest.fixture
def make_set(tmp_path):
    def make(name, count, kinds=(True, False), seed=0):
        generator = np.random.default_rng(seed)
        images, same = [], [kinds[pair % len(kinds)] for pair in range(count)]
        for kind in same:
            first = generator.integers(0, 256, (16, 16, 3))
            second = first if kind else generator.integers(0, 256, (16, 16, 3))
            for pixels in (first, np.clip(second + generator.integers(-90, 90, (16, 16, 3)), 0, 255)):
                stream = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
                images.append(stream.getvalue())
        (tmp_path / name).write_bytes(pickle.dumps((images, same)))
        return tmp_path / name

    return make


def test_json_is_the_last_line_and_has_the_numbers(main, model, make_set, capsys):
    path = make_set("faces.bin", 41)
    assert main(["--model", str(model), "--pairs", str(path), "--json", "--batch", "7"]) == 0
    output = capsys.readouterr().out.splitlines()
    result = json.loads(output[-1])
    pairs = read_pairs(path)
    expected = verify(blocks([pairs.decode(image) for image in range(82)]), pairs.same).to_json()
    assert set(result) == {"name", "accuracy", "accuracy_std", "threshold", "tar_at_far", "pairs", "doubts", "seconds"}
    assert result["name"] == "faces"
    assert result["seconds"] > 0
    assert {name: result[name] for name in ("accuracy", "accuracy_std", "tar_at_far", "pairs")} == {
        name: expected[name] for name in ("accuracy", "accuracy_std", "tar_at_far", "pairs")
    }
    assert result["accuracy"] > 0.8
    assert result["tar_at_far"]["1e-4"] is None
    table = "\n".join(output[:-1])
    assert "faces" in table
    assert f"{100 * expected['accuracy']:.2f}" in table
    assert "n/a" in table


def test_a_run_folder_stands_for_its_onnx_file(main, model, make_set, capsys):
    path = make_set("faces.bin", 20)
    results = []
    for given in (model, model.parent):
        assert main(["--model", str(given), "--pairs", str(path), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        del results[-1]["seconds"]
    assert results[0] == results[1]


def test_several_sets(main, model, make_set, capsys):
    paths = [str(make_set("one.bin", 20, seed=1)), str(make_set("two.bin", 30, seed=2))]
    assert main(["--model", str(model), "--pairs", *paths, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["sets"]) == paths
    assert [item["pairs"] for item in result["sets"].values()] == [20, 30]
    assert result["pairs"] == 20


def test_without_json_only_the_table(main, model, make_set, capsys):
    assert main(["--model", str(model), "--pairs", str(make_set("faces.bin", 20))]) == 0
    assert "{" not in capsys.readouterr().out


def test_images_of_another_size_are_fitted_as_asked(main, model, make_set, tmp_path, capsys):
    path = make_set("faces.bin", 20)
    images, same = pickle.loads(path.read_bytes())
    framed = []
    for image in images:  # a frame of 4 pixels on the left and on the right, which a crop takes off again
        stream = io.BytesIO()
        pixels = np.asarray(Image.open(io.BytesIO(image)))
        Image.fromarray(np.pad(pixels, ((0, 0), (4, 4), (0, 0)), mode="wrap")).save(stream, "PNG")
        framed.append(stream.getvalue())
    (tmp_path / "framed.bin").write_bytes(pickle.dumps((framed, same)))
    results = {}
    for name, given in {"crop": ["--fit", "crop"], "resize": []}.items():
        for file in ("faces.bin", "framed.bin"):
            assert main(["--model", str(model), "--pairs", str(tmp_path / file), "--json", *given]) == 0
            results[name, file] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["crop", "framed.bin"]["threshold"] == results["crop", "faces.bin"]["threshold"]
    assert results["resize", "framed.bin"]["threshold"] != results["resize", "faces.bin"]["threshold"]
    assert main(["--model", str(model), "--pairs", str(tmp_path / "framed.bin"), "--fit", "exact"]) == 2
    assert "40 images are not 16 x 16 pixels (40 of 24 x 16)" in capsys.readouterr().err


def test_mistakes_exit_with_2_and_no_traceback(main, model, make_set, tmp_path, capsys):
    good = str(make_set("good.bin", 20))
    for given, pairs, message in (
        (model, str(make_set("genuine.bin", 20, kinds=(True,))), "all 20 pairs are genuine"),
        (model, str(tmp_path / "none.bin"), "cannot be read"),
        (tmp_path / "none.onnx", good, "no such file"),
        (tmp_path / "good.bin", good, "ONNX Runtime cannot load it: it is a pickle"),
    ):
        assert main(["--model", str(given), "--pairs", pairs, "--json"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert message in captured.err
        assert "Traceback" not in captured.err


@pytest.mark.parametrize("batch", ["0", "x"])
def test_a_batch_below_one_is_refused(main, model, make_set, batch, capsys):
    assert main(["--model", str(model), "--pairs", str(make_set("faces.bin", 20)), "--batch", batch]) == 2
    assert "--batch" in capsys.readouterr().err


def test_says_what_was_taken_and_what_to_doubt(main, model, make_set, tmp_path, capsys):
    path = make_set("[b]set.bin", 40, kinds=(True,) * 20 + (False,) * 20)
    assert main(["--model", str(model), "--pairs", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert "[b]set: a .bin file, 20 genuine and 20 impostor pairs, in 10 folds" in captured.err
    assert "WARNING [b]set: its ten folds hold 4, 4, 4, 4, 4, 0" in captured.err
    assert "the file does not say what it takes: RGB, (x - 127.5) / 127.5" in captured.err
    assert "[b]set" in "".join(captured.out.splitlines()[:-1])
    assert json.loads(captured.out.splitlines()[-1])["doubts"]
    assert main(["--model", str(model), "--pairs", str(path), "--folds", "even"]) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_missing_images_are_left_out_when_asked(main, model, make_set, tmp_path, capsys):
    pairs = read_pairs(make_set("faces.bin", 30))
    (tmp_path / "images").mkdir()
    lines = []
    for pair, same in enumerate(pairs.same):
        for image in (0, 1):
            (tmp_path / f"images/{pair}_{image}.png").write_bytes(pairs.images[2 * pair + image])
        lines.append(f"{pair}_0.png {pair}_1.png {int(same)}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    (tmp_path / "images/4_1.png").unlink()
    (tmp_path / "images/7_0.png").write_bytes(b"no face was found")
    arguments = ["--model", str(model), "--pairs", str(tmp_path / "list.txt"), "--images", str(tmp_path / "images")]
    assert main(arguments) == 2
    assert "1 of 60 images cannot be used" in capsys.readouterr().err
    assert main([*arguments, "--skip-missing", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["pairs"] == 28 and len(result["doubts"]) == 2
    kept = [pair for pair in range(30) if pair not in (4, 7)]
    expected = verify(
        blocks([pairs.decode(2 * pair + image) for pair in kept for image in (0, 1)]), pairs.same[kept]
    ).to_json()
    assert result["accuracy"] == expected["accuracy"]


def test_options_for_files_of_others_reach_the_embedder(main, model, make_set, capsys):
    path = make_set("faces.bin", 20)
    arguments = ["--model", str(model), "--pairs", str(path)]
    for wrong, message in (
        (["--size", "32"], "takes images of 16 x 16 pixels only, not 32"),
        (["--output", "norm"], "has no output norm, but embedding [1, 48]"),
        (["--std", "0"], "--std divides the levels"),
        (["--mean", "1", "2"], "--mean takes one number, or three"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main([*arguments, "--mean", "0", "--std", "255", "--bgr", "--output", "embedding", "--size", "16"]) == 0
    assert "does not say" not in capsys.readouterr().err
