import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before anything imports Triton, also in the ranks' processes: its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
MARKS = {
    "distributed": ("distributed",),
    "integration": ("slow", "distributed"),
    "kernels": ("slow",),
    "soak": ("slow",),
    "gpu": ("gpu",),
}


# The same examples everywhere and every time, and no deadline, which a busy machine would miss. A test's examples share
# its folder, and write what they read.
settings.register_profile(
    "stable",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("stable")


def pytest_configure() -> None:
    # Small tensors gain nothing from threads, and wait long for them on a busy machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, so that `-m "not slow and not distributed"` is the quick part."""
    for item in items:
        for mark in MARKS.get(item.path.relative_to(REPOSITORY / "tests").parts[0], ()):
            item.add_marker(mark)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real faces and files of the original tools; tests that need them skip where they are absent."""
    folder = Path(os.environ.get("RECOGNITION_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set RECOGNITION_TEST_DATA)")
    return folder


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row optimizer does where the host does not know the flag."""
    monkeypatch.setattr("recognition.head.class_weights.optimizer._host_knows", lambda tensor: False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no text: reports of tests with names of any bytes travel between processes as UTF-8."""
    report = yield
    report.sections = [(name, _text(content)) for name, content in report.sections]
    if report.longrepr is not None and (shown := _text(str(report.longrepr))) != str(report.longrepr):
        report.longrepr = shown
    return report


def _text(content: str) -> str:
    return content.encode(errors="backslashreplace").decode()
