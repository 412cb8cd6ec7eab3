import gzip
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from recognition.errors import UserError
from recognition.evaluation.pairs import read_pairs


def encoded(value, form="PNG", size=(8, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 255 - value)).save(stream, form)
    return stream.getvalue()


IMAGES = [encoded(value) for value in range(8)]
SAME = [True, False, False, True]


def write(folder, content, protocol=4, name="set.bin"):
    (folder / name).write_bytes(pickle.dumps(content, protocol))
    return folder / name


def arrays(images):
    return [np.frombuffer(image, np.uint8).copy() for image in images]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("images", "same"),
    [
        (IMAGES, SAME),
        (tuple(IMAGES), np.array(SAME)),
        (arrays(IMAGES), [np.bool_(flag) for flag in SAME]),
        ([array.reshape(-1, 1) for array in arrays(IMAGES)], np.array(SAME, ">i4")),
        ([array.reshape(1, -1) for array in arrays(IMAGES)], [np.int64(flag) for flag in SAME]),
        (np.stack(arrays(IMAGES[:1] * 8)), SAME),
    ],
)
def test_pickles_of_every_protocol_give_the_same_set(tmp_path, protocol, images, same):
    if isinstance(images, np.ndarray):
        images = list(images)
    pairs = read_pairs(write(tmp_path, (images, same), protocol))
    assert pairs.images == [bytes(np.frombuffer(bytes(image), np.uint8)) for image in images]
    assert pairs.same.dtype == bool
    assert pairs.same.tolist() == SAME
    assert len(pairs) == 4
    assert pairs.name == "set"


def test_reads_pickles_of_python_2(tmp_path):
    # What Python 2 writes: byte strings for the images and inside NumPy's objects.
    def string(text):
        return b"T" + struct.pack("<i", len(text)) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt"
        + string(b"b")
        + b"tR(I1\n(I%d\nt" % len(IMAGES[0])
    )
    array += b"cnumpy\ndtype\n(" + string(b"u1") + b"I0\nI1\ntR(I3\n" + string(b"|") + b"NNNI-1\nI-1\nI0\ntbI00\n"
    array += string(IMAGES[0]) + b"tb"
    path = tmp_path / "old.bin"
    path.write_bytes(b"\x80\x02(](" + array + string(IMAGES[1]) + b"e](I01\net.")
    pairs = read_pairs(path)
    assert pairs.images == IMAGES[:2]
    assert pairs.same.tolist() == [True]
    np.testing.assert_array_equal(pickle.loads(path.read_bytes(), encoding="latin1")[0][0].tobytes(), IMAGES[0])


@pytest.mark.parametrize(
    ("file", "count", "genuine"),
    [("lfw-split/dev_fold9.bin", 600, 300), ("formats/small_lfw.bin", 10, 10), ("formats/py2_style.bin", 20, 10)],
)
def test_reads_files_of_the_original_tools(shared_data, file, count, genuine):
    pairs = read_pairs(shared_data / file)
    bins, issame = pickle.loads((shared_data / file).read_bytes(), encoding="bytes")
    assert (len(pairs), pairs.same.sum()) == (count, genuine)
    assert pairs.same.tolist() == list(issame)
    assert pairs.images == [bytes(image) for image in bins]
    expected = np.asarray(Image.open(io.BytesIO(bytes(bins[-1]))).convert("RGB"))
    np.testing.assert_array_equal(pairs.decode(2 * count - 1), expected)
    assert expected.shape == (112, 112, 3)


def test_decodes_to_rgb(tmp_path):
    gray = io.BytesIO()
    Image.new("L", (3, 2), 77).save(gray, "PNG")
    pairs = read_pairs(write(tmp_path, ([encoded(9), gray.getvalue()], [True])))
    assert pairs.decode(0).shape == (6, 8, 3)
    assert pairs.decode(0)[0, 0].tolist() == [9, 18, 246]
    assert pairs.decode(1).tolist() == [[[77] * 3] * 3] * 2


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda payload: payload,
        lambda payload: ([payload], [True]),
        lambda payload: ([*IMAGES, payload], SAME),
        lambda payload: (np.array([payload, *IMAGES[1:]], object), SAME),
        lambda payload: (IMAGES, np.array([payload, True], object)),
        lambda payload: (IMAGES, SAME, payload),
    ],
)
def test_refuses_a_file_that_wants_to_run_code(tmp_path, protocol, wrap):
    proof = tmp_path / "ran"
    path = write(tmp_path, wrap(Payload(os.system, f"touch {proof}")), protocol)
    with pytest.raises(UserError, match=r"set\.bin: refused: .*(posix|nt)\.system"):
        read_pairs(path)
    assert not proof.exists()


@pytest.mark.parametrize("function", [np.fromfile, np.load, eval, getattr, np.array, zlib.decompress])
def test_refuses_all_names_that_are_not_needed(tmp_path, function):
    with pytest.raises(UserError, match="refused"):
        read_pairs(write(tmp_path, ([Payload(function, "x")] * 2, [True])))


def test_refuses_dotted_names(tmp_path):
    path = tmp_path / "dotted.bin"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.mro\\n\x93.")
    with pytest.raises(UserError):
        read_pairs(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGES[:7], SAME), "odd number of images"),
        ((IMAGES[:6], SAME), "6 images for 4 pairs"),
        (([], []), "holds no pairs"),
        ((IMAGES, [1, 0, 2, 1]), "not a list of booleans: item 2 is 2, of the kind int"),
        ((IMAGES, [1, 0, -1, 1]), "not a list of booleans: it holds 0 and -1 both"),
        ((IMAGES, ["1", "0", "no", "1"]), "not a list of booleans: item 2 is 'no', of the kind str"),
        ((IMAGES, [0.5, 0.1, 0.9, 1]), "not a list of booleans: item 0 is 0.5"),
        ((IMAGES, None), "not a list of booleans"),
        ((IMAGES, [10**400, 0, 0, 1]), "not a list of booleans"),
        ((IMAGES, np.array(SAME, object)), "not a list of booleans: it is an array of dtype O8"),
        ((IMAGES, np.array([1.0, 0, 0, np.nan])), "item 3 is nan"),
        ((IMAGES, np.array([1, 0, 0, 1], complex)), "dtype c16"),
        ((np.array(IMAGES, object), SAME), "does not hold"),
        (([*IMAGES[:2], 7, *IMAGES[3:]], SAME), "image 1 of pair 2 is not bytes"),
        (([*IMAGES[:2], "ann/1.JPG", *IMAGES[3:]], SAME), "image 1 of pair 2 .* name of a file, ann/1.JPG"),
        (([np.zeros((6, 8, 3), np.uint8)] * 8, SAME), r"image 1 of pair 1 .* decoded picture, .*\[6, 8, 3\].* encoded"),
        (([np.zeros((6, 8), np.uint8)] * 8, SAME), r"image 1 of pair 1 .* decoded picture, .* encoded"),
        ((np.zeros((8, 6, 8, 3), np.uint8), SAME), r"one array of shape \[8, 6, 8, 3\].* must be encoded"),
        (([*IMAGES[:3], np.zeros(4), *IMAGES[4:]], SAME), "image 2 of pair 2 .* dtype f8"),
        (([*IMAGES[:7], np.zeros(4, np.uint16)], SAME), "image 2 of pair 4 .* dtype u2"),
        (([np.array(IMAGES[:1], object)] * 8, SAME), "image 1 of pair 1 .* dtype O8"),
        (IMAGES, "does not hold"),
        ({"images": IMAGES}, "holds a dict of 'images'; it does not hold"),
        ((IMAGES, SAME, "more"), "holds a tuple of 3; it does not hold"),
    ],
)
def test_says_what_is_wrong_with_a_set(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"set\.bin: .*{message}"):
        read_pairs(write(tmp_path, content))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("images", [IMAGES, arrays(IMAGES)])
def test_truncated_at_any_byte_is_an_error(tmp_path, protocol, images):
    content = pickle.dumps((images, SAME), protocol)
    path = tmp_path / "cut.bin"
    for length in range(2, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.bin: truncated after"):
            read_pairs(path)


def test_files_that_are_no_set(tmp_path):
    with pytest.raises(UserError, match=r"none\.bin: cannot be read: No such file"):
        read_pairs(tmp_path / "none.bin")
    (tmp_path / "cfp.bin").touch()
    with pytest.raises(UserError, match=r"cannot be read: it is a folder; give a file in it, such as .*cfp\.bin"):
        read_pairs(tmp_path)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(UserError, match="is empty"):
        read_pairs(tmp_path / "empty.bin")
    (tmp_path / "noise.bin").write_bytes(encoded(3))
    with pytest.raises(UserError, match="not a verification set"):
        read_pairs(tmp_path / "noise.bin")


def test_undecodable_images_are_named(tmp_path):
    images = [*IMAGES[:3], IMAGES[3][:40], b"", *IMAGES[5:]]
    pairs = read_pairs(write(tmp_path, (images, SAME)))
    assert pairs.decode(2).shape == (6, 8, 3)
    for image, name in ((3, "image 2 of pair 2"), (4, "image 1 of pair 3")):
        with pytest.raises(UserError, match=rf"set\.bin: {name} cannot be decoded"):
            pairs.decode(image)


@pytest.mark.parametrize("size", [8001, 10_000, 60_000])
def test_images_that_claim_to_be_huge_are_not_decoded(tmp_path, size):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    pairs = read_pairs(write(tmp_path, ([IMAGES[0], bomb], [True])))
    with pytest.raises(UserError, match="image 2 of pair 1 cannot be decoded: it has more than 64,000,000 pixels"):
        pairs.decode(1)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "flags",
    [
        np.array(SAME, float),
        np.array(SAME, ">f4"),
        np.where(SAME, 1, -1),
        np.where(SAME, 1, -1).tolist(),
        np.where(SAME, 1.0, -1.0).astype(">i2"),
        ["1", "0", "0", "1"],
        ["True", "False", "false", "true"],
        [np.float32(flag) for flag in SAME],
        [1.0, 0, False, True],
    ],
)
def test_flags_in_all_their_kinds(tmp_path, flags, protocol):
    assert read_pairs(write(tmp_path, (IMAGES, flags), protocol)).same.tolist() == SAME


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (gzip.compress(pickle.dumps((IMAGES, SAME))), "gzip"),
        (bytes(4000), "zeros"),
        (b"a b 1\n" * 20, "text .*another suffix, such as .txt"),
        (struct.pack("<8i", *range(8)), "not a verification set"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, message):
    for name in ("set.bin", "set.pkl"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_pairs(tmp_path / name)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="NumPy array"):
        read_pairs(tmp_path / "array.npy")


@pytest.mark.parametrize("name", ["set.bin", "set.pkl", "set", "pairs.txt", "set.dat"])
@pytest.mark.parametrize("protocol", [0, 1, 4])
def test_a_pickle_is_one_whatever_its_name(tmp_path, name, protocol):
    assert read_pairs(write(tmp_path, (IMAGES, SAME), protocol, name)).same.tolist() == SAME
