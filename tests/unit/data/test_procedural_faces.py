import dataclasses
import hashlib
import io
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recognition.data.insightface_rec import scan
from recognition.data.procedural import dataset
from recognition.data.procedural.identity import capture_parameters
from recognition.data.procedural.renderer import draw
from recognition.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
IDENTITIES, IMAGES, PAIRS = 5, 3, 40


def digest(identity: int, image: int) -> str:
    return hashlib.sha256(dataset.encode(7, identity, image)).hexdigest()


def write(folder: Path, **changes: int) -> None:
    numbers = {
        "identities": IDENTITIES,
        "images_per_identity": IMAGES,
        "pairs": PAIRS,
        "seed": 7,
        "pair_identities": 20,
    }
    dataset.write_faces(folder, progress=False, **(numbers | {"workers": 1} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faces")
    write(path)
    return path


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        return np.asarray(image)


def test_an_image_depends_on_neither_order_nor_process():
    names = [(identity, image) for identity in (0, 3, dataset.FIRST_TEST_IDENTITY) for image in (0, 5)]
    here = [digest(*name) for name in names]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.starmap(digest, names[::-1])[::-1]
    assert here == there
    assert len(set(here)) == len(names)
    assert dataset.encode(8, 0, 0) != dataset.encode(7, 0, 0)


def test_an_image_is_a_face_sized_rgb_picture():
    image = dataset.render(0, 0, 0)
    assert image.shape == (112, 112, 3) and image.dtype == np.uint8
    assert decode(dataset.encode(0, 0, 0)).shape == (112, 112, 3)


def test_a_smaller_image_is_the_same_face():
    small = decode(dataset.encode(0, 1, 2, 56)).astype(np.float64)
    means = dataset.render(0, 1, 2).reshape(56, 2, 56, 2, 3).mean((1, 3))
    assert small.shape == (56, 56, 3)
    # The filter is another one, and JPEG loses some: 6.5 of 255 levels in the mean. Other faces differ by 37 and more.
    assert np.abs(small - means).mean() < 12


def test_images_of_another_size_replace_those_there(folder: Path, tmp_path: Path):
    write(tmp_path, image_size=32)
    record = tmp_path / "train.rec"
    sizes = {decode(each).shape for each in pickle.loads((tmp_path / "pairs.bin").read_bytes())[0]}
    assert sizes == {(32, 32, 3)}
    before = record.read_bytes()
    write(tmp_path, image_size=32)
    assert record.read_bytes() == before
    write(tmp_path)
    assert record.read_bytes() == (folder / "train.rec").read_bytes()


def test_images_of_an_identity_share_its_parameters_and_differ_in_all_else(monkeypatch):
    drawn = []

    def note(identity, capture):
        drawn.append((identity, capture))
        return np.zeros(1)

    monkeypatch.setattr(dataset, "draw", note)
    monkeypatch.setattr(dataset, "expose", lambda canvas, capture: canvas)
    for identity, image in ((4, 0), (4, 1), (5, 0), (5, 1)):
        dataset.render(7, identity, image)
    assert drawn[0][0] == drawn[1][0] != drawn[2][0] == drawn[3][0]
    captures = [dataclasses.astuple(capture) for _, capture in drawn]
    for field, values in zip(dataclasses.fields(capture_parameters(7, 4, 0)), zip(*captures, strict=True), strict=True):
        if field.name in ("yaw", "smile", "lamp", "background", "noise_seed"):
            assert len(set(values)) == 4, field.name


def test_every_parameter_is_finite_and_varies_between_identities():
    people = [dataclasses.asdict(dataset.identity_parameters(0, identity)) for identity in range(60)]
    for name in people[0]:
        values = [person[name] for person in people]
        assert len(set(values)) > 10, name
        assert np.isfinite(np.array(values, dtype=float)).all(), name


def test_the_eyes_lie_where_the_standard_alignment_puts_them():
    # The pixels that change when only the eyes close, against ArcFace's template: (38.3, 51.7) and (73.5, 51.5).
    total = np.zeros((112, 112))
    for identity in range(24):
        person = dataset.identity_parameters(1, identity)
        for image in range(2):
            capture = dataclasses.replace(capture_parameters(1, identity, image), glasses=0.0, object_edge=None)
            shut = dataclasses.replace(capture, eyes_open=0.3)
            total += np.abs(draw(person, capture) - draw(person, shut)).sum(0)
    for columns, expected in ((slice(0, 56), 38.3), (slice(56, 112), 73.5)):
        half = total[:, columns]
        x = (half.sum(0) * np.arange(112)[columns]).sum() / half.sum()
        y = (half.sum(1) * np.arange(112)).sum() / half.sum()
        assert abs(x - expected) < 3 and abs(y - 51.6) < 3, (x, y)


def test_the_training_set_is_read_back_in_order(folder):
    records, labels = scan(folder / "train.rec")
    assert labels.tolist() == [identity for identity in range(IDENTITIES) for _ in range(IMAGES)]
    data = (folder / "train.rec").read_bytes()
    for row, (offset, length) in enumerate(zip(records.offsets, records.lengths, strict=True)):
        assert data[int(offset) : int(offset) + int(length)] == dataset.encode(7, *divmod(row, IMAGES))


def test_the_verification_set_is_the_one_that_was_drawn(folder):
    images, same = pickle.loads((folder / "pairs.bin").read_bytes())
    names, expected = dataset.verification_pairs(7, PAIRS, 20)
    assert same == expected and len(images) == 2 * PAIRS
    assert images[3] == dataset.encode(7, *names[3])
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("pairs, identities", [(1200, 200), (60, 21)])
def test_verification_pairs_are_of_unseen_identities_in_balanced_folds_of_their_own(pairs, identities):
    names, same = dataset.verification_pairs(7, pairs, identities)
    assert len(same) == pairs and len(set(names)) == len(names) == 2 * pairs
    people = np.array(names)[:, 0].reshape(-1, 2)
    assert people.min() >= dataset.FIRST_TEST_IDENTITY
    assert ((people[:, 0] == people[:, 1]) == same).all()
    folds = [set(fold.ravel().tolist()) for fold in np.array_split(people, 10)]
    assert sum(len(fold) for fold in folds) == len(set.union(*folds)) == identities
    assert all(sum(fold) * 2 == len(fold) for fold in np.array_split(np.array(same), 10))


def test_processes_write_the_same_files_as_one(folder, tmp_path):
    write(tmp_path, workers=2)
    for name in ("train.rec", "train.idx", "property", "pairs.bin", "faces.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in folder.iterdir())


def test_the_verification_set_does_not_depend_on_the_training_set(folder, tmp_path):
    write(tmp_path, identities=2)
    assert (tmp_path / "pairs.bin").read_bytes() == (folder / "pairs.bin").read_bytes()


def test_finished_faces_are_left_alone_and_others_replaced(tmp_path, monkeypatch):
    write(tmp_path, identities=1, images_per_identity=1, pairs=20)
    rendered = []
    encode = dataset.encode

    def note(*name):
        rendered.append(name)
        return encode(*name)

    monkeypatch.setattr(dataset, "encode", note)
    write(tmp_path, identities=1, images_per_identity=1, pairs=20)
    assert not rendered
    write(tmp_path, identities=1, images_per_identity=2, pairs=20)
    assert len(rendered) == 2 + 40
    rendered.clear()
    (tmp_path / "pairs.bin").write_bytes(b"cut off")
    write(tmp_path, identities=1, images_per_identity=2, pairs=20)
    assert len(rendered) == 2 + 40


def test_an_interrupted_rendering_leaves_no_files_that_look_finished(tmp_path, monkeypatch):
    encode = dataset.encode

    def fail(seed: int, identity: int, *image: int) -> bytes:
        if identity == 1:
            raise KeyboardInterrupt
        return encode(seed, identity, *image)

    monkeypatch.setattr(dataset, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, identities=2, images_per_identity=1, pairs=20)
    assert [path.name for path in tmp_path.iterdir()] == ["faces.json"]
    monkeypatch.setattr(dataset, "encode", encode)
    write(tmp_path, identities=2, images_per_identity=1, pairs=20)
    assert json.loads((tmp_path / "faces.json").read_text())["sizes"]["train.rec"] > 0


def test_somebody_elses_data_is_not_overwritten(tmp_path):
    (tmp_path / "train.rec").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"train\.rec.*choose another folder"):
        write(tmp_path)
    assert (tmp_path / "train.rec").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "changes, message",
    [({"pairs": 30}, "multiple of 20"), ({"identities": 0}, "0 identities"), ({"pair_identities": 19}, "two a fold")],
)
def test_impossible_numbers_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_raw_pixels_do_not_verify():
    names, same = dataset.verification_pairs(0, 120, 40)
    pixels = np.stack([dataset.render(0, *name).ravel() for name in names]).astype(np.float64)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    cosine = (pixels[0::2] * pixels[1::2]).sum(1)
    best = max(((cosine >= threshold) == same).mean() for threshold in cosine)
    assert 0.5 < best < 0.8


def test_the_program_names_a_mistake_and_exits_with_2(tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / "faces.py"), "--output", str(tmp_path / "new")]
    done = subprocess.run([*command, "--pairs", "7"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pairs is 7") and "Traceback" not in done.stderr
