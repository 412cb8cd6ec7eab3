import io
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from recognition.tracking import progress, terminal
from recognition.tracking.progress import on_advance, task
from recognition.tracking.terminal import escape, fit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Terminal]]:
    """Makes standard error a terminal of so many columns."""

    def make(columns: int) -> Terminal:
        file = Terminal()
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        return file

    yield make
    assert terminal._display._live is None


def shown(file: Terminal) -> list[str]:
    """Every line that was on the terminal, without control sequences."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))


def test_short_work_says_nothing_on_what_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with task("indexing", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_long_work_says_so_at_the_start_and_from_time_to_time_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "AFTER", 0.05)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    with task("verifying lfw", 1200, after=0.05) as advance:
        time.sleep(0.1)
        advance(400)
        time.sleep(0.2)
    lines = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "INFO verifying lfw: 0/1,200 images"
    assert lines[1] == "INFO verifying lfw: 400/1,200 images"
    assert lines[-1] == "INFO verifying lfw: done in 0 s"


def test_the_first_line_can_come_at_once_and_work_that_fails_is_not_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(OSError, match="full"), task("starting", after=0):
        time.sleep(0.05)
        raise OSError("full")
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == ["INFO starting"]


def test_a_rank_that_is_not_the_machines_first_says_nothing_but_is_heard(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    beats: list[int] = []
    silence = on_advance(lambda: beats.append(1))
    with task("indexing", 3, after=0) as advance:
        for done in (1, 2, 3):
            advance(done)
    silence()
    with task("indexing") as advance:
        advance(1)
    assert capsys.readouterr().err == "" and len(beats) == 3


def test_a_name_is_shown_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    with task("verifying [bold]a\nb[/bold] :smile: \udcff", after=0):
        time.sleep(0.05)
    assert capsys.readouterr().err[25:] == "verifying [bold]a\\nb[/bold] :smile: \\udcff\n"


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_a_bar_fits_its_terminal_and_goes_away(screen: Callable[[int], Terminal], columns: int) -> None:
    file = screen(columns)
    with task("verifying a set with a rather long name", 12_000) as advance:
        advance(3_000)
        time.sleep(0.3)
        terminal.write("above [it]")
    lines = [line.rstrip() for line in shown(file)]
    assert "above [it]" in lines
    bars = [line for line in lines if line.startswith("verifying")]
    assert bars and all(cell_len(line) <= columns for line in bars)
    if columns == 80:
        assert any("3,000/12,000 images" in line and "left" in line for line in bars)
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_bars_share_one_display_and_log_lines_go_above(screen: Callable[[int], Terminal]) -> None:
    file = screen(80)
    log = logging.getLogger("recognition.tracking.progress")
    with task("verifying", 4) as outer, task("decoding", 2) as inner:
        outer(1)
        inner(1)
        handler = terminal.Handler()
        handler.handle(log.makeRecord("x", logging.INFO, "", 1, "a bad image", (), None))
        time.sleep(0.3)
    lines = [line.rstrip() for line in shown(file)]
    assert "a bad image" in lines
    after = lines[lines.index("a bad image") + 1 :]
    assert any(line.startswith("verifying") for line in after) and any(line.startswith("decoding") for line in after)


def test_what_matters_least_goes_first_when_there_is_no_room() -> None:
    parts = [(0, "step 12/25"), (2, "loss 1.0"), (1, "ETA 0:01:00"), (3, "lr 0.1")]
    assert fit(parts, 80) == "step 12/25  loss 1.0  ETA 0:01:00  lr 0.1"
    assert fit(parts, 40) == "step 12/25  loss 1.0  ETA 0:01:00"
    assert fit(parts, 24) == "step 12/25  ETA 0:01:00"
    assert fit(parts, 5) == "step 12/25"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("José 張 ± x̂", "José 張 ± x̂"),
        ("a\tb\r\nc\x1b[2J", "a\\tb\\r\\nc\\x1b[2J"),
        ("caf\udce9", "caf\\udce9"),
        ("left\u202eright\u2028", "left\\u202eright\\u2028"),
    ],
)
def test_an_escaped_text_is_one_line_of_unicode(text: str, line: str) -> None:
    assert escape(text) == line
    assert len(escape(text).encode("utf-8").splitlines()) == 1


def test_a_terminal_of_ascii_shows_bars_and_lines(screen: Callable[[int], Terminal]) -> None:
    screen(30)
    assert sys.__stderr__ is not None
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=sys.__stderr__.errors)
    file.isatty = lambda: True  # type: ignore[method-assign]
    sys.stderr = file
    with task("verifying a set that is called José ± \udcff", 10) as advance:
        advance(5)
        time.sleep(0.3)
        terminal.write("an image of José is bad")
    file.flush()
    written = file.buffer.getvalue()
    assert b"an image of Jos\\xe9 is bad" in written and b"verifying a set" in written


def test_training_says_that_it_starts_before_torch_is_loaded() -> None:
    code = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            import time; time.sleep(0.2); raise SystemExit(3)
sys.meta_path.insert(0, Stop())
import train
train.main(["configs/demo.toml"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[0].endswith("INFO starting: loading torch")


def test_another_rank_leaves_the_first_ones_display_a_line_to_draw_on(
    screen: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = screen(80)
    monkeypatch.setenv("LOCAL_RANK", "1")
    terminal.write("[rank 1] WARNING a bad image")
    assert file.getvalue() == "\r\x1b[K[rank 1] WARNING a bad image\n\n"
