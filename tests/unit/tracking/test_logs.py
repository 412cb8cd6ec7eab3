import errno
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from recognition.tracking.logs import Appender, setup_logging

package = logging.getLogger("recognition.data")


def lines(path: Path) -> list[str]:
    return [line[20:] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_told_before_there_is_a_file_stands_in_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with setup_logging() as log:
        package.warning("7 files passed over")
        log.write_to(tmp_path / "log.txt")
        package.info("indexed")
    assert lines(tmp_path / "log.txt") == [
        "WARNING recognition.data: 7 files passed over",
        "INFO recognition.data: indexed",
    ]
    assert [line[20:] for line in capsys.readouterr().err.splitlines()] == [
        "WARNING 7 files passed over",
        "INFO indexed",
    ]


def test_a_run_inside_another_one_has_its_log(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    with setup_logging() as outer:
        with setup_logging(rank=3) as inner:
            assert inner is outer
        assert len(logging.getLogger().handlers) == len(before) + 1
    assert logging.getLogger().handlers == before


def test_a_record_is_one_line_whatever_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with setup_logging() as log:
        log.write_to(tmp_path / "log.txt")
        package.warning("no image %s in [red]%s[/red]", "a\nb\x1b[31m", "caf\udce9 José ±")
    expected = "no image a\\nb\\x1b[31m in [red]caf\\udce9 José ±[/red]"
    assert lines(tmp_path / "log.txt") == [f"WARNING recognition.data: {expected}"]
    assert capsys.readouterr().err[28:] == expected + "\n"


def test_a_terminal_of_another_encoding_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sys.__stderr__ is not None
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=sys.__stderr__.errors)
    monkeypatch.setattr(sys, "stderr", ascii_only)
    with setup_logging():
        package.warning("±5 ×2 José")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue()[28:] == rb"\xb15 \xd72 Jos\xe9" + b"\n"


def test_a_warning_that_comes_again_and_again_is_told_a_few_times_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with setup_logging() as log:
        log.write_to(tmp_path / "log.txt")
        for step in range(1, 1235):
            package.warning("step %d: not finite", step)
            if step < 3:
                package.warning("%s", f"note {step}")
        package.info("step %d", 1)
    told = [line.partition(": ")[2] for line in lines(tmp_path / "log.txt")]
    assert told == [
        "step 1: not finite",
        "note 1",
        "step 2: not finite",
        "note 2",
        "step 3: not finite",
        "step 10: not finite (10 times so far)",
        "step 100: not finite (100 times so far)",
        "step 1000: not finite (1,000 times so far)",
        "step 1",
        "1,234 times in all, the last: step 1234: not finite",
    ]
    assert capsys.readouterr().err.count("not finite") == 7


def test_other_ranks_write_no_file_and_mark_their_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with setup_logging(rank=5):
        package.info("quiet")
        package.warning("a bad image")
    assert capsys.readouterr().err == "[rank 5] WARNING recognition.data: a bad image\n"


def test_pythons_warnings_are_records(tmp_path: Path) -> None:
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with setup_logging() as log:
            log.write_to(tmp_path / "log.txt")
            warnings.warn("an old name", FutureWarning, stacklevel=1)
    (line,) = lines(tmp_path / "log.txt")
    assert line.startswith("WARNING py.warnings: ") and line.endswith("FutureWarning: an old name")
    assert warnings.showwarning is shown


def full(file: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("how", ["full", "cut", "removed"])
def test_a_record_that_cannot_be_written_is_left_out_whole_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, write = tmp_path / "metrics.jsonl", os.write
    file = Appender(path)
    file.write(b"one\n")
    with monkeypatch.context() as patch:
        if how == "removed":
            path.unlink()
        else:
            patch.setattr(os, "write", full if how == "full" else lambda fd, data: write(fd, data[:2]))
        file.write(b"two\n")
        file.write(b"three\n")
    file.write(b"four\n")
    file.close()
    file.close()
    if how != "removed":
        assert path.read_bytes() == b"one\nfour\n"
    reason = "it was removed" if how == "removed" else "No space left on device"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} cannot be written ({reason}): training goes on without it"
    ]


def test_a_log_file_that_is_full_is_said_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with setup_logging() as log:
        log.write_to(tmp_path / "log.txt")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            package.info("one")
            package.info("two")
        package.info("three")
    assert lines(tmp_path / "log.txt") == ["INFO recognition.data: three"]
    told: list[Any] = [line[20:] for line in capsys.readouterr().err.splitlines()]
    assert len(told) == 4 and sum("log.txt cannot be written (No space" in line for line in told) == 1


def test_only_what_is_named_is_kept_from_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("torch.utils.cpp_extension")
    with setup_logging():
        library.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        library.warning("No C++ compiler is found")
    told = capsys.readouterr().err
    assert "C++ compiler" in told and "CUDA" not in told
    assert not library.filters
