import io
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from recognition import config
from recognition.config import Tracking
from recognition.errors import UserError
from recognition.tracking import terminal
from recognition.tracking import tracker as tracker_module
from recognition.tracking.tracker import peak_memory
from tests.support.tracked import RESULT, events, records, run, scalars, tracker


def test_metrics_hold_the_first_the_last_and_every_tenth_step(tmp_path: Path) -> None:
    before = time.time()
    run(tmp_path, 1, 25)
    written = records(tmp_path)
    assert [record["step"] for record in written] == [1, 10, 20, 25]
    assert [record["epoch"] for record in written] == [0.1, 1.0, 2.0, 2.5]
    assert [record["loss"] for record in written] == pytest.approx([100, 10, 5, 4])
    assert all(before - 1 <= record["time"] <= time.time() for record in written)
    assert all(record["lr"] == 0.1 and record["memory_gib"] > 0 for record in written)
    assert "images_per_second" not in written[0] and written[1]["images_per_second"] > 0


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    run(tmp_path, 1, 25)
    assert scalars(tmp_path, "train/loss") == [(1, 100.0), (10, 10.0), (20, 5.0), (25, 4.0)]
    expected = {"loss", "lr", "images_per_second", "memory_gib"}
    assert set(events(tmp_path).Tags()["scalars"]) == {f"train/{name}" for name in expected}


def test_values_are_read_from_the_device_only_for_a_record(tmp_path: Path) -> None:
    reads = []

    class Value:
        def __float__(self) -> float:
            reads.append(step)
            return 1.0

    with tracker(tmp_path) as track:
        for step in range(1, 26):
            track.log_step(step, {"loss": Value()})  # type: ignore[dict-item]
    assert reads == [1, 10, 20, 25]


def test_a_resumed_run_leaves_no_step_twice(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        for step in range(1, 24):
            track.log_step(step, {"loss": torch.tensor(-1.0)})
            if step in (10, 20):
                track.log_verification(step, "lfw", RESULT)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')  # what a crash leaves
    run(tmp_path, 11, 25)
    written = [(record["step"], record.get("verification"), record.get("loss")) for record in records(tmp_path)]
    assert written == [
        (1, None, -1.0),
        (10, None, -1.0),
        (10, "lfw", None),
        (11, None, pytest.approx(100 / 11)),
        (20, None, 5.0),
        (25, None, 4.0),
    ]
    expected = [(1, -1.0), (10, -1.0), (11, pytest.approx(100 / 11)), (20, 5.0), (25, 4.0)]
    assert scalars(tmp_path, "train/loss") == expected
    assert [step for step, _ in scalars(tmp_path, "verification/lfw/accuracy")] == [10]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}')
    run(tmp_path, 4, 4)
    assert [record["step"] for record in records(tmp_path)] == [3, 4]


def test_what_is_not_finite_is_null_in_json_and_itself_in_tensorboard(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        track.log_step(1, {"loss": torch.tensor(float("nan")), "gradient_norm": float("inf")})
    assert records(tmp_path)[0]["loss"] is None and records(tmp_path)[0]["gradient_norm"] is None
    assert np.isnan(scalars(tmp_path, "train/loss")[0][1])


def test_a_record_can_be_read_at_once(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        track.log_step(1, {"loss": 1.0})
        assert records(tmp_path)[0]["loss"] == 1.0


def test_verification_is_recorded_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path) as track:
        track.log_verification(20, "lfw", RESULT)
    (record,) = records(tmp_path)
    assert {key: record[key] for key in RESULT} == RESULT
    assert (record["step"], record["verification"]) == (20, "lfw")
    assert scalars(tmp_path, "verification/lfw/accuracy") == [(20, pytest.approx(0.9912))]
    assert scalars(tmp_path, "verification/lfw/tar_at_far_1e-3") == [(20, pytest.approx(0.985))]
    assert "verification/lfw/tar_at_far_1e-4" not in events(tmp_path).Tags()["scalars"]
    told = capsys.readouterr().err
    assert (
        "step 20  lfw: accuracy 99.12% +- 0.31% on 6,000 pairs; TAR@FAR 1e-1: 99.80%, 1e-3: 98.50%, 1e-4: n/a" in told
    )


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_sample_images_are_shown_once_with_their_colours(tmp_path: Path, kind: str) -> None:
    colours = [(255, 0, 0), (10, 200, 30), (1, 2, 254), (90, 90, 90), (7, 7, 7)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(5, 3, 8, 8)
    if kind == "float":
        images = (images - 127.5) / 127.5
    with tracker(tmp_path) as track:
        track.log_images("first batch", images, 0)
        track.log_images("first batch", images.flip(1), 1)
    (event,) = events(tmp_path).Images("first batch")
    pixels = np.asarray(_open_image(event.encoded_image_string)).reshape(-1, 3)
    assert [int((pixels == colour).all(axis=1).sum()) for colour in colours] == [64, 64, 64, 64, 0]


def _open_image(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def test_images_can_be_turned_off_and_a_resumed_run_has_no_first_batch(tmp_path: Path) -> None:
    with tracker(tmp_path / "off", config=Tracking(preview_images=0)) as track:
        track.log_images("first batch", torch.zeros(2, 3, 8, 8), 0)
    with tracker(tmp_path / "resumed", start_step=5) as track:
        track.log_images("first batch", torch.zeros(2, 3, 8, 8), 0)
    assert events(tmp_path / "off").Tags()["images"] == events(tmp_path / "resumed").Tags()["images"] == []


def test_plain_lines_have_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, 1, 25)
    told = capsys.readouterr().err
    assert "step 1/25  epoch 0.10  loss 100.0000  lr 0.1" in told
    assert "step 25/25  epoch 2.50  loss 4.0000  lr 0.1" in told and "img/s  ETA 0:00:00" in told
    assert all(character.isprintable() or character == "\n" for character in told)
    assert "step 25/25" in (tmp_path / "log.txt").read_text()


def test_other_ranks_write_nothing_and_warn_with_their_number(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "recognition")
    monkeypatch.setattr(tracker_module, "_rank", lambda: 3)
    folder = tmp_path / "run"
    with tracker(folder, is_main=False) as track, track.pause("verification"):
        track.log_step(1, {"loss": torch.tensor(1.0)})
        track.log_verification(1, "lfw", RESULT)
        track.log_images("first batch", torch.zeros(2, 3, 8, 8), 0)
        track.note("for the reader")
        logging.getLogger("recognition.data").info("quiet")
        logging.getLogger("recognition.data").warning("a bad image")
    assert not folder.exists()
    assert capsys.readouterr().err == "[rank 3] WARNING recognition.data: a bad image\n"


def test_log_keeps_what_the_package_says_with_times_and_close_lets_go(tmp_path: Path) -> None:
    root, package = logging.getLogger(), logging.getLogger("recognition")
    handlers, level = list(root.handlers), package.level
    track = tracker(tmp_path)
    logging.getLogger("recognition.data").info("index built")
    track.note("100 % of it")
    track.close()
    track.close()
    track.log_step(1, {"loss": 1.0})
    package.warning("after the end")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == [
        "INFO recognition.data: index built",
        "INFO recognition.tracking.tracker: 100 % of it",
    ]
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)
    assert (list(root.handlers), package.level) == (handlers, level)


def test_the_files_are_finished_when_training_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), tracker(tmp_path) as track:
        track.log_step(1, {"loss": 1.0})
        raise RuntimeError("out of memory")
    assert scalars(tmp_path, "train/loss") == [(1, 1.0)]


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.folder: .*file.run cannot be written: .*Not a directory"):
        tracker(tmp_path / "file" / "run")


def test_peak_memory_is_that_of_the_process() -> None:
    status = Path("/proc/self/status")
    if not status.exists() or torch.cuda.is_initialized():
        pytest.skip("no /proc, or a GPU in use")
    kibibytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory() == pytest.approx(kibibytes * 1024, rel=0.05)


def test_events_of_another_writer_stay(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("head/rows", 7.0, 3)
    run(tmp_path, 5, 5)
    assert scalars(tmp_path, "head/rows") == [(3, 7.0)]


AWKWARD = ["a b", "a/b", "[bold]x[/bold]", ":smile:", "Jos\u00e9 \u5f35", "caf\udce9", "a\nb\tc", "50 % of {it}", "."]


def test_sets_of_any_name_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.array([0.5]), np.array([-0.5])
    with tracker(tmp_path) as track:
        for name in AWKWARD:
            track.log_verification(20, name, RESULT | {"where": name}, scores)
        track.log_results(dict.fromkeys(AWKWARD, 0.5))
    lines = (tmp_path / "metrics.jsonl").read_bytes().decode("utf-8").split("\n")
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in AWKWARD]
    assert [json.loads(line)["verification"] for line in lines[:-1]] == shown
    assert lines[-1] == "" and "\\udce9" not in "".join(lines).replace("\\\\udce9", "")
    tags = [f"verification/{terminal.escape(name)}/accuracy" for name in AWKWARD]
    assert set(tags) <= set(events(tmp_path).Tags()["scalars"]) and len(set(tags)) == len(AWKWARD)
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert len(text.splitlines()) == len(AWKWARD)
        assert all(f"step 20  {terminal.escape(name)}: accuracy" in text for name in AWKWARD)


def test_histograms_of_scores_have_the_same_bins(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    genuine, impostor = generator.uniform(0.2, 0.9, 300), generator.normal(0, 0.1, 500)
    genuine[0] = 1.0000001  # as rounding may have it
    with tracker(tmp_path) as track:
        track.log_verification(20, "lfw", RESULT, (genuine, impostor))
        track.log_verification(20, "without", RESULT)
    found = events(tmp_path)
    assert set(found.Tags()["histograms"]) == {"scores/lfw/genuine", "scores/lfw/impostor"}
    limits = []
    for kind, values in (("genuine", genuine), ("impostor", impostor)):
        (event,) = found.Histograms(f"scores/lfw/{kind}")
        assert event.step == 20
        histogram = event.histogram_value
        limits.append(histogram.bucket_limit)
        upper = np.array(histogram.bucket_limit)
        lower = np.concatenate([[-1], upper[:-1]])
        last = upper == upper[-1]
        expected = [
            np.sum((values >= low) & ((values < high) | is_last))
            for low, high, is_last in zip(lower, upper, last, strict=True)
        ]
        assert histogram.bucket == expected and sum(expected) == histogram.num == len(values)
    assert limits[0] == limits[1]


def test_settings_and_final_numbers_are_in_the_same_event_file(tmp_path: Path) -> None:
    settings = config.Config.model_validate({"data": {"path": "x"}}, context={"check_paths": False, "rendered": None})
    with tracker(tmp_path) as track:
        track.log_config(settings)
        track.log_verification(25, "lfw", RESULT)
        track.log_results({"lfw": 0.9912})
    assert len(list(tmp_path.glob("events*"))) == 1 and not [path for path in tmp_path.iterdir() if path.is_dir()]
    found = events(tmp_path)
    (text,) = found.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert [line[4:] for line in shown.split("\n")] == settings.to_toml().split("\n")
    start = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parameters = HParamsPluginData.FromString(start).session_start_info.hparams
    assert parameters["optimizer.lr"].number_value == settings.optimizer.lr
    assert parameters["head.loss.name"].string_value == settings.head.loss.name
    experiment = found.SummaryMetadata("_hparams_/experiment").plugin_data.content
    (metric,) = HParamsPluginData.FromString(experiment).experiment.metric_infos
    assert metric.name.tag == "verification/lfw/accuracy" in found.Tags()["scalars"]


def test_a_full_disk_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with tracker(tmp_path, config=Tracking(every_steps=1)) as track:
        track.log_step(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            patch.setattr("recognition.tracking.logs.os.write", full)
            for step in range(2, 11):
                track.log_step(step, {"loss": 1.0})
            track.log_verification(10, "lfw", RESULT, (np.zeros(3), np.zeros(3)))
        track.log_step(11, {"loss": 3.0})
    told = capsys.readouterr().err
    for name in ("metrics.jsonl", "events.out", "log.txt"):
        assert sum(name in line and "cannot be written" in line for line in told.splitlines()) == 1, told
    assert [record["step"] for record in records(tmp_path)] == [1, 11]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (11, 3.0)]


def test_a_run_folder_that_goes_away_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path / "run", config=Tracking(every_steps=1)) as track:
        track.log_step(1, {"loss": 1.0})
        shutil.rmtree(tmp_path / "run")
        for step in range(2, 6):
            track.log_step(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("cannot be written (it was removed)") == 3
