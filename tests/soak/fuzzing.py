"""Files that nobody can trust, damaged at random: `make soak SOAK=fuzzing` (SECONDS=60 for each kind, SEED=0).

Whatever the bytes are, a reader gives what it found or an error in words (UserError; BadImage, which puts an image into
quarantine). It runs nothing that the file says, does not crash and does not hang.
"""

import io
import os
import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recognition.data.index import open_index
from recognition.data.insightface_rec import InsightFaceWriter, scan
from recognition.data.quarantine import BadImage, check_header
from recognition.errors import UserError
from recognition.evaluation.pairs import read_pairs

SECONDS, SEED = float(os.environ.get("SECONDS", "60")), int(os.environ.get("SEED", "0"))
LONGEST = 60.0
"""Seconds of processor time that a file may take: most take milliseconds, but an image may say that it has 64 million
pixels, which is as many as are allowed."""
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1]
MAGIC = bytes.fromhex("0a23d7ce")


def encoded(form: str, seed: int = 0, size: int = 24, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def damage(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """One to four changes: bits, numbers at their limits, bytes that go, come twice, or come from elsewhere."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(content) + 1), chance.choice([1, 2, 4, 8, 40, 400])
        match chance.randrange(7):
            case 0:
                content[place : place + 1] = bytes(b ^ 1 << chance.randrange(8) for b in content[place : place + 1])
            case 1:
                number = chance.choice(NUMBERS).to_bytes(8, chance.choice(["little", "big"]))
                content[place : place + min(length, 8)] = number[: min(length, 8)]
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + length]
            case 4:
                content[place:place] = chance.randbytes(length)
            case 5:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                content[place : place + length] = other[start : start + length]
            case _:
                del content[place:]
    return bytes(content)


def fuzz(kind: str, seeds: list[bytes], read: Callable[[bytes], object], executed: Path) -> str:
    """Read damaged files for `SECONDS`; a line that counts what came of them."""
    chance, outcomes, longest = random.Random(f"{kind} {SEED}"), Counter[str](), 0.0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        data = damage(chance.choice(seeds), chance, seeds)
        start = time.process_time()
        try:
            read(data)
            outcomes["read"] += 1
        except (UserError, BadImage) as error:
            assert str(error), "an error without words"
            outcomes[type(error).__name__] += 1
        except BaseException:
            (kept := Path(f"fuzzing-{kind.replace(' ', '-')}.bin").absolute()).write_bytes(data)
            pytest.fail(f"{kind}, file {outcomes.total() + 1} of seed {SEED}, kept as {kept}", pytrace=True)
        taken = time.process_time() - start
        longest = max(longest, taken)
        assert taken < LONGEST, f"{kind}, file {outcomes.total()} of seed {SEED}: {taken:.1f} s"
        assert not executed.exists(), f"{kind}, file {outcomes.total()} of seed {SEED}: it ran what it was told to"
    assert len(outcomes) > 1, f"only one outcome: {outcomes}"
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
    return (
        f"\nfuzzing: {kind}: {outcomes.total():,} files (seed {SEED}): {counts}; at most {1000 * longest:.0f} ms each"
    )


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def records(folder: Path) -> Path:
    """A data set of six images, one of whose records is divided: its payload has RecordIO's own magic number in it."""
    with InsightFaceWriter(folder) as writer:
        for label in range(3):
            writer.add(label, encoded("JPEG", label))
            writer.add(label, encoded("PNG", label, size=8) + MAGIC * 3)
    return folder


@pytest.fixture
def executed(tmp_path: Path) -> Path:
    return tmp_path / "executed"


pytestmark = pytest.mark.timeout(0)


@pytest.mark.parametrize("name", ["train.rec", "train.rec without .idx", "train.idx"])
def test_record_files(name: str, tmp_path: Path, executed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records(tmp_path / "records")
    target = folder / name.split()[0]
    if "without" in name:
        (folder / "train.idx").unlink()
    seeds = [target.read_bytes(), *(path.read_bytes() for path in sorted(folder.iterdir()))]

    def read(data: bytes) -> None:
        target.write_bytes(data)
        scan(folder / "train.rec")
        index = open_index(folder)
        for sample in range(index.num_images):
            index.read(sample)

    with capsys.disabled():
        print(fuzz(name, seeds[:1] * 3 + seeds, read, executed))


def test_pairs(tmp_path: Path, executed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [encoded("JPEG", seed, 16) for seed in range(4)]
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    evil = ([Payload(executed), *images[1:]], [True, False])
    seeds = [pickle.dumps((some, [True, False]), protocol) for some in (images, arrays) for protocol in (0, 2, 4, 5)]
    seeds += [pickle.dumps(evil, protocol) for protocol in (0, 2, 4, 5)]
    path = tmp_path / "set.bin"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        pairs = read_pairs(path)
        for image in range(2 * len(pairs)):
            pairs.decode(image)

    with capsys.disabled():
        print(fuzz("pairs", seeds, read, executed))


def test_lists_of_pairs(tmp_path: Path, executed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("Ann_0001.jpg", "Ann_0002.jpg", "Bo_0001.jpg"):
        (tmp_path / name).write_bytes(encoded("JPEG", size=8))
    seeds = [
        b"3\n" + b"Ann 1 2\n" * 3 + b"Ann 1 Bo 1\n" * 3,
        b"name,imagenum1,imagenum2,\n" + b"Ann,1,2,\nAnn,1,Bo,1\n" * 3,
        b"Ann_0001.jpg 1\nAnn_0002.jpg 1\nAnn_0001.jpg 0\nBo_0001.jpg 0\n" * 2,
        "\ufeff".encode() + b"Ann_0001.jpg\tBo_0001.jpg\t0\r\nAnn_0001.jpg\tAnn_0002.jpg\t1\r\n" * 3,
        "Ann_0001.jpg;Bo_0001.jpg;-1\nAnn_0001.jpg;Ann_0002.jpg;1\n".encode("utf-16"),
    ]
    path = tmp_path / "pairs.txt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for missing in ("refuse", "skip"):
            pairs = read_pairs(path, missing=missing)
            assert len(pairs.images) == 2 * len(pairs) == len(pairs.files)

    with capsys.disabled():
        print(fuzz("lists of pairs", seeds, read, executed))


def test_image_headers(executed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [encoded(form) for form in ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")]
    seeds.append(encoded("JPEG", progressive=True, restart_marker_blocks=2, comment=b"\xff\xc0 no frame header"))
    with capsys.disabled():
        print(fuzz("image headers", seeds, check_header, executed))


def test_index_files(tmp_path: Path, executed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = records(tmp_path / "records")
    open_index(folder)
    index_folder = folder / ".recognition-index"
    whole = Path(shutil.copytree(index_folder, tmp_path / "whole"))
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert len(files) > 3
    seeds = [bytes([number]) + (whole / file).read_bytes() for number, file in enumerate(files)]

    def read(data: bytes) -> None:
        # The first byte says which of the index's files the others become.
        if not data:
            raise UserError("no file")
        file = files[data[0] % len(files)]
        shutil.rmtree(index_folder)
        shutil.copytree(whole, index_folder)
        (index_folder / file).write_bytes(data[1:])
        index = open_index(folder)
        assert index.num_images == 6 and index.num_identities == 3, "another data set"
        for sample in range(index.num_images):
            index.read(sample)

    with capsys.disabled():
        print(fuzz("index files", seeds, read, executed))
