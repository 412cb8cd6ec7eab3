"""What a folder of images is taken for, and what is said of the rest."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recognition.data.derived_index import merge_indexes
from recognition.data.image_folder import scan
from recognition.data.index import Index, build_index, check_trainable, open_index
from recognition.data.insightface_rec import pack_image
from recognition.data.recordio import RecordWriter
from recognition.errors import UserError
from recognition.images import SUFFIXES
from recognition.tracking.progress import on_advance


def make(root: Path, *names: str, content: bytes = b"image") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, form)
    return buffer.getvalue()


def rec(path: Path, labels: list[int], listed: list[int] | None = None) -> Path:
    """Records whose images are b"<file> <number>"; `listed`: the records that the .idx has, in its order."""
    with RecordWriter(path) as writer:
        for key, label in enumerate(labels):
            writer.write(key, pack_image(label, key, f"{path.name} {key}".encode()))
    if listed is not None:
        lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)
        path.with_suffix(".idx").write_text("".join(lines[number] for number in listed))
    return path


def people(index: Index) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for sample, label in enumerate(index.labels.tolist()):
        found.setdefault(index.identities[label], []).append(index.read(sample))
    return found


def notes(folder: Path) -> str:
    return "\n".join(open_index(folder).notes)


def test_every_kind_of_image_is_taken_in_any_case(tmp_path: Path) -> None:
    kinds = ".jpg .jpeg .jpe .jfif .png .bmp .dib .webp .tif .tiff .pgm .ppm .pbm .pnm .jp2 .j2k"
    assert set(kinds.split()) <= set(SUFFIXES)
    listing = scan(make(tmp_path, *(f"{kind}/1{kind}"[1:] for kind in SUFFIXES), "Bo/1.JPG", "Bo/2.Tiff"))
    assert list(listing.identities) == ["Bo", *sorted(kind[1:] for kind in SUFFIXES)]
    assert not listing.notes


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_an_image_without_a_suffix_is_known_by_its_first_bytes(tmp_path: Path, form: str) -> None:
    make(tmp_path, "Al/0-FaceId-0", "Al/trailing.", content=encoded(form))
    make(tmp_path, "Al/README", content=b"BMI of each person, 1998-2004")
    make(tmp_path, "Al/empty", content=b"")
    listing = scan(tmp_path)
    assert list(listing.names) == ["Al/0-FaceId-0", "Al/trailing."]
    assert listing.notes == ("not taken: 2 files without a suffix that are no images (Al/README, ...)",)


def test_all_that_is_not_taken_is_counted_once(tmp_path: Path) -> None:
    make(
        tmp_path,
        "Al/1.jpg",
        "Al/notes.txt",
        "Bo/1.gif",
        "Bo/.x.jpg",
        ".trash/1.jpg",
        "loose.jpg",
        "Cy/1.jpg",
        "list.txt",
    )
    (tmp_path / "Al" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "Al" / "turn.jpg").symlink_to("turn.jpg")  # to itself
    os.mkfifo(tmp_path / "Al" / "pipe.jpg")
    (tmp_path / "Empty").mkdir()
    listing = scan(tmp_path)
    assert list(listing.names) == ["Al/1.jpg", "Cy/1.jpg"]
    (note,) = listing.notes
    for part in (
        "2 .txt files (list.txt, ...)",
        "1 .gif file (Bo/1.gif)",
        "2 hidden files or folders (.trash, ...)",
        "1 image outside the folders (loose.jpg)",
        "2 links that lead nowhere (Al/gone.jpg, ...)",
        "1 thing that is neither file nor folder (Al/pipe.jpg)",
        "2 folders without an image (Bo, ...)",
    ):
        assert part in note
    index = build_index(tmp_path)
    assert note in index.notes
    assert open_index(tmp_path).notes == index.notes  # the index's own folder is not among the hidden ones


def test_what_becomes_of_the_rest_is_said_of_an_index_that_stays(tmp_path: Path) -> None:
    first = build_index(make(tmp_path, "Al/1.jpg", "Bo/1.jpg", "Bo/2.jpg"))
    assert first.notes == ("1 of 2 identities have one image only",)
    make(tmp_path, "Bo/film.mp4")
    assert "1 .mp4 file (Bo/film.mp4)" in notes(tmp_path)
    assert open_index(tmp_path).fingerprint == first.fingerprint


def test_many_kinds_stay_one_line(tmp_path: Path) -> None:
    make(tmp_path, "Al/1.jpg", *(f"Al/x.{number}" for number in range(50)))
    (note,) = scan(tmp_path).notes
    assert note.endswith(", 42 others")
    assert len(note) < 400


def test_images_a_level_deeper_are_told(tmp_path: Path) -> None:
    make(tmp_path, "p0/1.jpg", "p0/2019/a.jpg", "p0/2019/b.jpg", "p0/2020/none.txt", "p1/1.jpg", "p2/2019/c.jpg")
    listing = scan(tmp_path)
    assert list(listing.names) == ["p0/1.jpg", "p1/1.jpg"]
    assert "3 images that lie a level deeper, in 2 folders inside the identity folders (p0/2019)" in listing.notes[1]


@pytest.mark.parametrize("inside", ["train", "train/aligned"])
def test_a_set_one_or_more_levels_too_deep_names_the_folder_to_give(tmp_path: Path, inside: str) -> None:
    make(tmp_path, *(f"{inside}/{person}/{image}.jpg" for person in ("a", "b") for image in (1, 2)))
    with pytest.raises(UserError, match=r"hold no images themselves.*data\.path=(\S+?); several") as caught:
        open_index(tmp_path)
    given = str(caught.value).split("data.path=")[1].split(";")[0]
    assert list(open_index(Path(given)).identities) == ["a", "b"]


def test_one_persons_folder_names_the_folder_to_give(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(UserError, match=r"give the folder above, data\.path=") as caught:
        open_index(tmp_path / "a")
    assert open_index(Path(str(caught.value).split("data.path=")[1])).num_identities == 2


def test_a_person_who_is_there_twice_is_told(tmp_path: Path) -> None:
    make(tmp_path / "set", "Al/1.jpg", "JOSÉ/1.jpg", "José/1.jpg", "Jose\u0301/1.jpg")
    make(tmp_path, "elsewhere/1.jpg", "once/1.jpg")
    for name, target in (("Al2", "Al"), ("out", "../elsewhere"), ("out2", "../elsewhere"), ("only", "../once")):
        (tmp_path / "set" / name).symlink_to(target)
    links, alike = scan(tmp_path / "set").notes
    assert links.startswith("3 of the identity folders are links") and "(Al2, out, out2)" in links
    assert alike.startswith("2 identities have the name of another")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "Al/1.jpg", "Bo/1.jpg")
    original = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "Bo":
            raise PermissionError(13, "Permission denied")
        return original(folder)

    monkeypatch.setattr("recognition.data.image_folder.os.scandir", scandir)
    with pytest.raises(UserError, match=r"Bo: Permission denied: make it readable"):
        scan(tmp_path)


def test_a_large_folder_shows_that_it_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recognition.data.image_folder._FILES_PER_UPDATE", 10)
    make(tmp_path, *(f"Al/{number}.jpg" for number in range(100)))
    signs: list[None] = []
    end = on_advance(lambda: signs.append(None))
    scan(tmp_path)
    end()
    assert len(signs) >= 10


@pytest.mark.parametrize("count", [1, 3])
def test_one_identity_is_not_trained_on(tmp_path: Path, count: int) -> None:
    one = open_index(make(tmp_path, *(f"Al/{number}.jpg" for number in range(count))))
    with pytest.raises(UserError, match=r"1 identity \(Al\): nothing to tell apart"):
        check_trainable(one)
    check_trainable(open_index(make(tmp_path, "Bo/1.jpg")))


def test_a_rec_file_of_another_name_is_taken(tmp_path: Path) -> None:
    rec(tmp_path / "faces_webface.rec", [0, 1, 1])
    (tmp_path / "faces_webface.lst").touch()
    index = open_index(tmp_path)
    assert {name: len(images) for name, images in people(index).items()} == {"0": 1, "1": 2}
    assert index.notes[0] == "holds faces_webface.rec, which is taken"
    assert index.notes[1].startswith("not read: faces_webface.lst")


def test_what_lies_beside_train_rec_is_told(tmp_path: Path) -> None:
    rec(tmp_path / "train.rec", [0, 1])
    rec(tmp_path / "val.rec", [0, 1])
    make(tmp_path, "Al/1.jpg", "Bo/1.jpg")
    index = open_index(tmp_path)
    assert set(people(index)) == {"0", "1"}
    assert index.notes[0] == "holds train.rec, which is taken; not taken: 2 folders, val.rec"


def test_a_rec_file_does_not_hide_identity_folders(tmp_path: Path) -> None:
    rec(make(tmp_path, "Al/1.jpg", "Bo/1.jpg") / "old.rec", [0])
    assert set(people(open_index(tmp_path))) == {"Al", "Bo"}
    assert "1 .rec file (old.rec)" in notes(tmp_path)


def test_chunks_are_one_set(tmp_path: Path) -> None:
    for number, labels in ((0, [5, 1]), (2, [1, 9]), (10, [5])):
        rec(tmp_path / f"train_{number}.rec", labels)
    index = open_index(tmp_path)
    assert people(index) == {
        "5": [b"train_0.rec 0", b"train_10.rec 0"],
        "1": [b"train_0.rec 1", b"train_2.rec 0"],
        "9": [b"train_2.rec 1"],
    }
    assert "3 chunks, train_0.rec to train_10.rec" in index.notes[0]
    assert "chunk 1, 3, 4, 5, ... is not there" in index.notes[0]
    again = open_index(tmp_path)
    assert (again.folder, again.fingerprint) == (index.folder, index.fingerprint)
    rec(tmp_path / "train_1.rec", [5])
    assert open_index(tmp_path).num_images == 6


def test_several_rec_files_that_are_no_chunks_can_be_merged(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    paths = [rec(tmp_path / "set" / name, [0, 1]) for name in ("a.rec", "b.rec")]
    with pytest.raises(UserError, match=r"2 \.rec files \(a\.rec, b\.rec\).*merge OUT FILE.*--same-identities"):
        open_index(tmp_path / "set")
    indexes = [open_index(path) for path in paths]
    apart = merge_indexes(indexes, tmp_path / "apart")
    same = merge_indexes(indexes, tmp_path / "same", same_identities=True)
    assert people(apart) == {
        "0/0": [b"a.rec 0"],
        "0/1": [b"a.rec 1"],
        "1/0": [b"b.rec 0"],
        "1/1": [b"b.rec 1"],
    }
    assert people(open_index(tmp_path / "same")) == people(same)
    assert people(same) == {"0": [b"a.rec 0", b"b.rec 0"], "1": [b"a.rec 1", b"b.rec 1"]}


def test_a_list_beside_a_rec_file_names_the_file_to_give(tmp_path: Path) -> None:
    rec(tmp_path / "train.rec", [0, 1])
    with pytest.raises(UserError, match=r"train\.idx: neither .*: give train\.rec, which lies beside it"):
        open_index(tmp_path / "train.idx")


@pytest.mark.parametrize(
    ("listed", "taken", "said"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], ()),
        ([3, 1], [1, 3], ("lists 2 records; the other 2 of x.rec are not taken",)),
        ([1, 2], [1, 2], ("lists 2 records; the other 2 of x.rec are not taken",)),
        ([0, 1, 2, 3, 1, 1], [0, 1, 2, 3], ("lists 2 records more than once: each is taken once",)),
        ([2, 2], [2], ("lists 1 record more than once", "the other 3 of x.rec")),
    ],
)
def test_what_an_idx_does_not_cover_or_lists_twice(
    tmp_path: Path, listed: list[int], taken: list[int], said: tuple[str, ...]
) -> None:
    path = rec(tmp_path / "x.rec", [0, 0, 1, 1], listed)
    for index in (open_index(path), open_index(path)):
        assert sorted(image for images in people(index).values() for image in images) == [
            f"x.rec {number}".encode() for number in taken
        ]
        found = [note for note in index.notes if "have one image" not in note]
        assert len(found) == len(said)
        assert all(part in note for part, note in zip(said, found, strict=True))


def test_divided_records_are_covered(tmp_path: Path) -> None:
    magic = np.uint32(0xCED7230A).tobytes()
    with RecordWriter(tmp_path / "x.rec") as writer:
        for key, image in enumerate((magic * 3, b"abcd" + magic, b"plain", magic + b"abc")):
            writer.write(key, pack_image(key, key, image))
    index = open_index(tmp_path / "x.rec")
    assert [index.read(sample) for sample in range(4)] == [magic * 3, b"abcd" + magic, b"plain", magic + b"abc"]
    assert index.notes == ("4 of 4 identities have one image only",)


def test_large_labels_are_told_at_each_opening(tmp_path: Path) -> None:
    rec(tmp_path / "x.rec", [69003070, 69003072])
    for _ in range(2):
        assert "labels reach 69003072" in notes(tmp_path)
