import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recognition.data.insightface_rec import InsightFaceWriter, pack_image, scan
from recognition.data.recordio import Records, RecordWriter, read_records
from recognition.errors import UserError
from recognition.tracking.progress import on_advance

MAGIC = struct.pack("<I", 0xCED7230A)


def payloads(rec: Path, found: Records) -> list[bytes]:
    content = rec.read_bytes()
    pieces = [content[o : o + n] for o, n in zip(found.offsets.tolist(), found.lengths.tolist(), strict=True)]
    return [b"".join(pieces[begin:end]) for begin, end in zip(found.starts[:-1], found.starts[1:], strict=True)]


def alone(rec: Path, folder: Path) -> Path:
    """A copy of the .rec file without its .idx."""
    return Path(shutil.copyfile(rec, folder / "alone.rec"))


@pytest.fixture
def expected(shared_data):
    return json.loads((shared_data / "formats" / "expected.json").read_text())


@pytest.mark.parametrize("with_idx", [True, False])
def test_reads_what_mxnet_wrote_into_edge_rec(shared_data, expected, tmp_path, with_idx):
    rec = shared_data / "formats" / "edge.rec"
    rec = rec if with_idx else alone(rec, tmp_path)
    found, _ = read_records(rec)
    assert payloads(rec, found) == [bytes.fromhex(record["hex"]) for record in expected["edge"]]
    if with_idx:
        assert found.keys.tolist() == [record["key"] for record in expected["edge"]]


@pytest.mark.parametrize("with_idx", [True, False])
def test_reads_headers_that_mxnet_wrote(shared_data, expected, tmp_path, with_idx):
    rec = shared_data / "formats" / "edge_hdr.rec"
    rec = rec if with_idx else alone(rec, tmp_path)
    found, labels = scan(rec)
    assert payloads(rec, found) == [bytes.fromhex(record["payload_hex"]) for record in expected["edge_hdr"]]
    assert labels.tolist() == [record["label"][0] for record in expected["edge_hdr"]]
    assert "16777216" in found.notes[0]  # the label that float32 may have rounded


def test_writes_the_bytes_that_mxnet_writes(shared_data, expected, tmp_path):
    with RecordWriter(tmp_path / "edge.rec") as writer:
        for record in expected["edge"]:
            writer.write(record["key"], bytes.fromhex(record["hex"]))
    with RecordWriter(tmp_path / "edge_hdr.rec") as writer:
        for record in expected["edge_hdr"]:
            label = record["label"] if record["flag"] else record["label"][0]
            image = bytes.fromhex(record["payload_hex"])
            writer.write(record["key"], pack_image(label, record["id"], image, record["id2"]))
    for name in ("edge.rec", "edge.idx", "edge_hdr.rec", "edge_hdr.idx"):
        assert (tmp_path / name).read_bytes() == (shared_data / "formats" / name).read_bytes(), name


def test_im2rec_layout_has_the_labels_of_its_list(shared_data):
    rec = shared_data / "formats" / "im2rec" / "train.rec"
    listed = dict(line.split("\t")[:2] for line in rec.with_suffix(".lst").read_text().splitlines())
    found, labels = scan(rec)
    assert {str(key): str(label) for key, label in zip(found.keys, labels, strict=True)} == listed


@pytest.mark.parametrize("with_idx", [True, False])
def test_insightface_layout_has_the_labels_of_its_list(shared_data, tmp_path, with_idx):
    rec = shared_data / "lfw-split" / "train.rec"
    listed = [int(line.split("\t")[2]) for line in rec.with_suffix(".lst").read_text().splitlines()]
    found, labels = scan(rec if with_idx else alone(rec, tmp_path))
    assert labels.tolist() == listed
    assert len(found) == 4518


def test_insightface_writer_makes_the_identity_records_of_the_original_tool(shared_data, tmp_path):
    original = shared_data / "lfw-split" / "train.rec"
    found, labels = scan(original)
    images = payloads(original, found)
    with InsightFaceWriter(tmp_path / "new") as writer:
        for label, image in zip(labels.tolist(), images, strict=True):
            writer.add(label, image)
    rec = tmp_path / "new" / "train.rec"
    again, again_labels = scan(rec)
    assert payloads(rec, again) == images
    assert np.array_equal(again_labels, labels)
    assert again.keys.tolist() == list(range(1, 4519))
    assert (rec.parent / "property").read_text().strip() == (original.parent / "property").read_text().strip()
    identity_records = 341 * 40
    assert rec.read_bytes()[-identity_records:] == original.read_bytes()[-identity_records:]
    header = dict(line.split("\t") for line in original.with_suffix(".idx").read_text().splitlines())["0"]
    assert rec.read_bytes()[:40] == original.read_bytes()[int(header) : int(header) + 40]


def test_insightface_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    with pytest.raises(UserError, match="identity 2 after identity 0"), InsightFaceWriter(tmp_path / "new") as writer:
        writer.add(0, b"image")
        writer.add(2, b"image")
    assert list((tmp_path / "new").iterdir()) == []


# Magic numbers at multiples of 4 divide a payload, elsewhere they do not.
PAYLOADS = st.lists(st.sampled_from([MAGIC, b"abcd", MAGIC[:2], b"x"]) | st.binary(max_size=9), max_size=12).map(
    b"".join
)


@given(wanted=st.lists(PAYLOADS, min_size=1, max_size=40))
def test_any_payload_comes_back(tmp_path: Path, wanted: list[bytes]) -> None:
    rec = tmp_path / "any.rec"
    with RecordWriter(rec) as writer:
        for key, payload in enumerate(wanted):
            writer.write(key, payload)
    assert payloads(rec, read_records(rec)[0]) == wanted
    rec.with_suffix(".idx").unlink()
    assert payloads(rec, read_records(rec)[0]) == wanted


LABELS = st.integers(0, 2**24 - 1)


@given(images=st.lists(st.tuples(LABELS | st.lists(LABELS, min_size=1, max_size=3), PAYLOADS), min_size=1, max_size=20))
@example(images=[([0, 1], b"image")])
def test_any_image_and_label_comes_back(tmp_path: Path, images: list[tuple[int | list[int], bytes]]) -> None:
    # Two labels without an image are InsightFace's records of identities.
    images = [(label, image or b"image") for label, image in images]
    with RecordWriter(tmp_path / "any.rec") as writer:
        for number, (label, image) in enumerate(images):
            writer.write(number, pack_image(label, number, image))
    found, labels = scan(tmp_path / "any.rec")
    assert payloads(tmp_path / "any.rec", found) == [image for _, image in images]
    assert labels.tolist() == [label if isinstance(label, int) else label[0] for label, _ in images]


def test_labels_cut_by_a_magic_number_come_back(tmp_path):
    # The id's two words and a label are magic numbers, so that the image's header itself is in pieces.
    (second,) = struct.unpack("<f", MAGIC)
    wanted = [
        pack_image((5.0, second, 2.0), 0xCED7230ACED7230A, b"\xff\xd8" + MAGIC * 3),
        pack_image((6.0, second), 1, b"image"),
    ]
    with RecordWriter(tmp_path / "cut.rec") as writer:
        for key, payload in enumerate(wanted):
            writer.write(key, payload)
    found, labels = scan(tmp_path / "cut.rec")
    assert payloads(tmp_path / "cut.rec", found) == [b"\xff\xd8" + MAGIC * 3, b"image"]
    assert labels.tolist() == [5, 6]


def test_undivided_magic_numbers_are_passed_over_without_an_idx(tmp_path):
    # A writer that does not divide records leaves the magic number in the payload.
    image = b"JPEG" + MAGIC + struct.pack("<I", 4) + b"data"
    payload = pack_image(3, 0, image)
    rec = tmp_path / "plain.rec"
    rec.write_bytes((MAGIC + struct.pack("<I", len(payload)) + payload) * 3)
    found, labels = scan(rec)
    assert payloads(rec, found) == [image] * 3
    assert labels.tolist() == [3, 3, 3]


def test_offsets_beyond_4_gib(tmp_path):
    rec = tmp_path / "large.rec"
    payload = pack_image(1, 0, b"image")
    record = MAGIC + struct.pack("<I", len(payload)) + payload + bytes(-len(payload) % 4)
    with rec.open("wb") as file:
        file.write(record)
        file.seek(5 << 30)
        file.write(record)
    rec.with_suffix(".idx").write_text(f"0\t0\n1\t{5 << 30}\n")
    found, _ = scan(rec)
    assert found.offsets.tolist() == [32, (5 << 30) + 32]


def small(folder: Path, labels: list[float]) -> Path:
    rec = folder / "small.rec"
    with RecordWriter(rec) as writer:
        for key, label in enumerate(labels):
            writer.write(10 + key, pack_image(label, key, b"image"))  # 40 bytes a record
    return rec


def test_images_come_in_the_order_of_the_file_whatever_the_idx_says(tmp_path):
    rec = small(tmp_path, [5, 3, 4])
    idx = rec.with_suffix(".idx")
    idx.write_text("".join(reversed(idx.read_text().splitlines(keepends=True))))
    found, labels = scan(rec)
    assert (found.keys.tolist(), labels.tolist()) == ([10, 11, 12], [5, 3, 4])


def test_an_empty_image_is_still_a_sample(tmp_path):
    with RecordWriter(tmp_path / "empty.rec") as writer:
        writer.write(1, pack_image(0, 1, b""))
        writer.write(2, pack_image((1.0, 2.0, 3.0), 2, b""))
    found, labels = scan(tmp_path / "empty.rec")
    assert payloads(tmp_path / "empty.rec", found) == [b"", b""]
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("label", [-1.0, 1.5, float("nan"), float("inf")])
def test_a_label_that_is_no_identity_is_refused(tmp_path, label):
    rec = small(tmp_path, [0, label])
    with pytest.raises(UserError, match=rf"small\.rec: record with key 11 at byte 40 has label {label}"):
        scan(rec)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.rec: No such file"):
        scan(tmp_path / "gone.rec")


@pytest.mark.parametrize(("size", "message"), [(100, "key 12 at byte 80 ends at byte 120"), (82, "key 12 at byte 80")])
def test_a_file_that_is_cut_off_is_refused(tmp_path, size, message):
    rec = small(tmp_path, [0, 1, 2])
    os.truncate(rec, size)
    with pytest.raises(UserError, match=rf"small\.rec: record with {message}.*copy"):
        scan(rec)
    rec.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"small\.rec: record 2, expected at byte 80|record 3, expected at byte 120"):
        scan(rec)


def test_every_cut_through_divided_records_is_refused(tmp_path):
    rec = tmp_path / "divided.rec"
    with RecordWriter(rec) as writer:
        writer.write(7, b"abcd" + MAGIC + b"ef" * 4 + MAGIC + b"g")
    whole = rec.read_bytes()
    for with_idx in (True, False):
        for size in range(len(whole)):
            rec.write_bytes(whole[:size])
            with pytest.raises(UserError, match=r"divided\.rec: .*(copy|pack)"):
                read_records(rec)
        if with_idx:
            rec.with_suffix(".idx").unlink()


def test_damaged_bytes_are_refused(tmp_path):
    rec = small(tmp_path, [0, 1, 2])
    content = bytearray(rec.read_bytes())
    content[40] ^= 1
    rec.write_bytes(content)
    with pytest.raises(UserError, match="record with key 11 at byte 40 does not begin with RecordIO's magic"):
        scan(rec)
    rec.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match="record 1, expected at byte 40: no magic number there"):
        scan(rec)


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        ("10\t0\n11\t4000\n", "key 11 at byte 4000 lies outside the file's 80 bytes"),
        ("10\t0\n11\t41\n", "key 11 at byte 41 lies .* off the 4-byte grid"),
        ("10\t0\n11\t-40\n", "key 11 at byte -40 lies outside"),
        ("10\t0\n11\t44\n", "key 11 at byte 44 does not begin"),
        ("10 zero\n", r"small\.idx: not lines of key and offset"),
        ("10\n11\n", r"small\.idx: not lines of key and offset"),
        ("", r"small\.idx: is empty"),
        ("\n \n", r"small\.idx: is empty"),
    ],
)
def test_an_idx_of_another_file_is_refused(tmp_path, idx, message):
    rec = small(tmp_path, [0, 1])
    rec.with_suffix(".idx").write_text(idx)
    with pytest.raises(UserError, match=message):
        scan(rec)


def test_an_idx_that_lost_lines_is_refused(tmp_path):
    with InsightFaceWriter(tmp_path) as writer:
        for label in range(3):
            writer.add(label, b"image")
    idx = tmp_path / "train.idx"
    idx.write_text("".join(idx.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=r"announces 3 images, train\.idx lists 2"):
        scan(tmp_path / "train.rec")
    idx.unlink()
    assert scan(tmp_path / "train.rec")[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("payload", [b"abc", struct.pack("<IfQQ", 9, 0, 0, 0) + b"too short"])
def test_records_that_are_no_images_are_refused(tmp_path, payload):
    with RecordWriter(tmp_path / "other.rec") as writer:
        writer.write(3, payload)
    with pytest.raises(UserError, match=r"other\.rec: record with key 3 at byte 0 .* too short"):
        scan(tmp_path / "other.rec")


def test_indexing_tells_that_it_is_at_work(tmp_path):
    signs: list[None] = []
    end = on_advance(lambda: signs.append(None))
    try:
        found, _ = scan(small(tmp_path, [0, 1, 2]))
    finally:
        end()
    assert signs
    assert not found.notes
