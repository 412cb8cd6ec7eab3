"""Speed, the time that remains, and the live line that shows them."""

import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from recognition.config import Tracking
from recognition.tracking.clock import Clock, _about, pause_intervals
from tests.support.tracked import RESULT, Terminal, fake_time, records, scalars, tracker


def test_plain_lines_are_far_between(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = fake_time(monkeypatch)
    with tracker(tmp_path, total_steps=1000, config=Tracking(every_steps=1)) as track:
        for step in range(1, 101):
            now[0] += 1.0
            track.log_step(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("loss") == 7  # at 1, 16, 31, ... 91 seconds
    assert len(records(tmp_path)) == 100


def test_the_wait_for_data_and_the_time_to_save_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = fake_time(monkeypatch)
    with tracker(tmp_path, start_step=4, total_steps=7, config=Tracking(every_steps=3)) as track:
        for step, waits in ((5, (0.5,)), (6, (1.0, 0.25)), (7, (0.75,))):
            for seconds in waits:
                with track.clock.data_wait():
                    now[0] += seconds
            now[0] += 10.0
            track.log_step(step, {"loss": 1.0})
            with track.saving(step):
                now[0] += 0.125 * step
    # Steps 5 and 6 have a record each, every third and the first; 7 is the last. The pauses are no part of the speed.
    steps = [record for record in records(tmp_path) if "loss" in record]
    assert [record["data_seconds"] for record in steps] == [0.5, 1.25, 0.75]
    assert steps[2]["images_per_second"] == pytest.approx(64 * 2 / (11.25 + 10.75))
    saved = [(record["step"], record["checkpoint_seconds"]) for record in records(tmp_path) if "loss" not in record]
    assert saved == [(5, 0.625), (6, 0.75), (7, 0.875)]
    assert scalars(tmp_path, "checkpoint/seconds") == saved
    assert scalars(tmp_path, "train/data_seconds") == [(5, 0.5), (6, 1.25), (7, 0.75)]


def test_the_wait_for_data_is_that_of_a_step() -> None:
    clock = Clock()
    assert clock.data_seconds(3, 0) is None
    with clock.data_wait():
        pass
    clock._data_seconds = 6.0
    assert clock.data_seconds(7, 4) == 2.0
    assert clock.data_seconds(9, 4) == 0.0


def test_pauses_come_at_the_checkpoints_and_those_are_at_verifications_too() -> None:
    assert pause_intervals(100, None) == {"saving": (100,)}
    assert pause_intervals(100, 30) == {"saving": (100, 30), "verification": (30,)}


def test_a_terminal_gets_a_live_line_and_its_cursor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with tracker(tmp_path) as track:
        for step in range(1, 13):
            track.log_step(step, {"loss": 1.0, "lr": 0.1})
        track.note("[bold]as it stands[/bold]")
    text = terminal.getvalue()
    assert "step 12/25" in text and "loss 1.0000" in text
    assert "[bold]as it stands[/bold]\n" in text.replace("\r", "")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert sys.stderr is terminal
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_speed_and_remaining_time_leave_out_the_first_step_and_the_pauses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = fake_time(monkeypatch)
    with tracker(tmp_path, total_steps=1010) as track:
        for step in range(1, 11):
            now[0] += 300.0 if step == 1 else 2.0
            if step == 5:
                with track.pause("verification"):
                    now[0] += 1000.0
            track.log_step(step, {"loss": 1.0})
    assert records(tmp_path)[-1]["images_per_second"] == pytest.approx(64 / 2)
    told = capsys.readouterr().err
    assert "32.0 img/s  ETA 0:33:20" in told
    assert told.count("training takes about 33 minutes on this machine") == 1


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.2, "10 seconds"), (61, "70 seconds"), (400, "7 minutes"), (8040, "2 hours"), (200_000, "2 days")],
)
def test_a_time_to_come_is_told_no_more_exactly_than_it_is_known(seconds: float, told: str) -> None:
    assert _about(seconds) == f"about {told}"


def test_speed_is_that_of_the_last_records(monkeypatch: pytest.MonkeyPatch) -> None:
    now = fake_time(monkeypatch)
    timer = Clock()
    rates = []
    for step in range(0, 50 * 10, 10):
        now[0] += 10.0 if step < 200 else 1.0
        rates.append(timer.rate(step))
    assert rates[0] is None
    assert rates[1] == pytest.approx(1.0) and rates[19] == pytest.approx(1.0) and rates[-1] == pytest.approx(10.0)
    assert rates[20] == pytest.approx(200 / (19 * 10 + 1))


def test_the_remaining_time_counts_verifications_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = fake_time(monkeypatch)
    every = {"verification": (100,), "saving": (0,)}
    etas = {}
    with tracker(tmp_path, total_steps=350, every=every) as track:
        for step in range(1, 351):
            now[0] += 2.0
            track.log_step(step, {"loss": 1.0})
            etas[step] = str(track._eta)
            if step % 100 == 0 or step == 350:
                with track.pause("verification"):
                    now[0] += 60.0
            if step == 350:
                with track.pause("saving"):
                    now[0] += 5.0
    # Three are to come before 300 and one after the last step; none is known before the first is done.
    assert etas[90] == f"ETA {timedelta(seconds=2 * 260)} plus 4 verifications"
    assert etas[100] == f"ETA {timedelta(seconds=2 * 250)} plus 4 verifications"
    assert etas[110] == f"ETA {timedelta(seconds=2 * 240 + 3 * 60)}"
    assert etas[300] == f"ETA {timedelta(seconds=2 * 50 + 2 * 60)}"
    assert etas[340] == f"ETA {timedelta(seconds=2 * 10 + 60)}"
    assert etas[350] == "ETA 0:01:00"
    assert "training takes about 11 minutes and 4 verifications on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 40])
def test_the_live_line_and_the_log_fit_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal_file = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal_file)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with tracker(tmp_path, total_steps=123_456, config=Tracking(every_steps=1)) as track:
        for step in range(1, 4):
            track.log_step(step, {"loss": 12.3456, "lr": 0.1})
            time.sleep(0.01)
        track.log_verification(3, "lfw", RESULT)
        track.block(["evaluate: " + "x" * 100])
        time.sleep(0.3)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal_file.getvalue()))
    assert all(len(line.rstrip()) <= columns for line in lines if "x" * 100 not in line), lines
    assert "evaluate: " + "x" * 100 in lines
    live = [line for line in lines if line.startswith("step 3/123,456")]
    assert live and "loss 12.3456" in live[-1]
    told = " ".join(line.strip() for line in lines)
    assert "accuracy 99.12% +- 0.31% on 6,000 pairs; TAR@FAR 1e-1: 99.80%" in told


def test_pauses_that_several_settings_bring_are_counted_once() -> None:
    for every in ((0,), (7,), (4, 6), (6, 6), (4, 6, 9)):
        timer = Clock(100, {"saving": every})
        with timer.pause("saving"):
            pass
        timer._paused["saving"] = [1.0]
        for step in (1, 11, 12, 36, 99, 100):
            due = [number for number in range(step, 101) if number == 100 or any(e and number % e == 0 for e in every)]
            assert timer.eta(step, 1.0).seconds == 100 - step + len(due), (every, step)
