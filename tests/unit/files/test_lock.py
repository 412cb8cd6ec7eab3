"""One folder, one run."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recognition.errors import UserError
from recognition.files import lock

HOLD = "import sys, time; from pathlib import Path; from recognition.files import lock\n"
HOLD += "with lock.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def write(folder: Path, **changes: object) -> None:
    holder = lock.this_process() | {"since": "2026-01-01 00:00:00"} | changes
    (folder / lock.NAME).write_text(json.dumps(holder))


def test_of_those_that_come_at_once_exactly_one_goes_on(tmp_path: Path) -> None:
    together, done, refused, went_on = threading.Barrier(8), threading.Barrier(8), [], []

    def run() -> None:
        together.wait()
        try:
            with lock.held(tmp_path):
                went_on.append(1)
                done.wait()
        except UserError as error:
            refused.append(str(error))
            done.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(went_on) == 1 and len(refused) == 7
    assert all(f"process {os.getpid()} on {socket.gethostname()}" in text for text in refused)
    assert not list(tmp_path.iterdir())
    with lock.held(tmp_path):
        pass


def test_a_lock_outlives_its_process_only_until_the_next_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with (
                pytest.raises(UserError, match=f"process {other.pid} on .* Wait for it or stop it"),
                lock.held(tmp_path),
            ):
                pass
            holder = json.loads((tmp_path / lock.NAME).read_text())
            assert lock.is_alive(holder)
        finally:
            other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert not lock.is_alive(holder), "a process that has ended and is not waited for yet"
    with lock.held(tmp_path):
        assert f"its process {other.pid} is gone" in caplog.text
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path, pid=os.getppid(), started="1")
    with lock.held(tmp_path):
        pass


def test_another_machines_lock_stands_until_it_is_removed(tmp_path: Path) -> None:
    write(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(UserError, match=f"process 7 on elsewhere.*remove {tmp_path / lock.NAME}"), lock.held(tmp_path):
        pass
    (tmp_path / lock.NAME).unlink()
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_that_says_nothing_is_of_a_run_that_died_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(lock, "_WRITTEN_WITHIN", 0.0)
    (tmp_path / lock.NAME).write_text(content)
    with lock.held(tmp_path):
        pass


def test_where_the_file_system_has_no_locks_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    write(tmp_path, pid=os.getppid(), started=lock._started(os.getppid()))
    with pytest.raises(UserError, match=f"process {os.getppid()}"), lock.held(tmp_path):
        pass
    write(tmp_path, pid=2**22 + 1)
    with lock.held(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write to .*missing"), lock.held(tmp_path / "missing"):
        pass
