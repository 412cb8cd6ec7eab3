import json
import os
import re
import unicodedata

import numpy as np
import pytest

from recognition.errors import UserError
from recognition.evaluation.pairs import read_pairs


def people(folder, names, suffix=".jpg"):
    """Files of LFW's names, each holding what it shows."""
    for name, numbers in names.items():
        (folder / name).mkdir(parents=True)
        for number in numbers:
            (folder / name / f"{name}_{number:04d}{suffix}").write_bytes(f"{name} {number}".encode())


def shown(pairs):
    """Each pair's images, and whether it is genuine."""
    images = [image.decode() for image in pairs.images]
    return list(zip(images[::2], images[1::2], pairs.same.tolist(), strict=True))


FOUR = [("Ann 1", "Ann 2", True), ("Ann 2", "Bo 1", False), ("Ann 3", "Ann 4", True), ("Bo 1", "Ann 4", False)]


def four(line, genuine, impostor, head=""):
    """The four pairs as lines, with `line` for each image."""
    lines = []
    for first, second, same in FOUR:
        names = [line.format(*image.split(), int(image.split()[1])) for image in (first, second)]
        lines.append((genuine if same else impostor).format(*names))
    return head + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("2\nAnn 1 2\nAnn 3 4\nAnn 2 Bo 1\nBo 1 Ann 4\n", "LFW"),
        ("Ann\t1\t2\nAnn\t2\tBo\t1\nAnn\t3\t4\nBo\t1\tAnn\t4\n", "LFW"),
        ("Ann 1 2\n\nAnn\t2 Bo  1 \r\nAnn 3 4\n Bo 1 Ann 4", "LFW"),
        ("name,imagenum1,imagenum2,\nAnn,1,2,\nAnn,2,Bo,1\nAnn,3,4,\nBo,1,Ann,4\n", "LFW.*'name,imagenum1,imagenum2,'"),
        ("Ann;1;2\nAnn;2;Bo;1\nAnn;3;4\nBo;1;Ann;4\n", "LFW"),
        (four("{0}_{2:04d}.jpg", "{} 7\n{} 7", "{} 0\n{} 0"), "CALFW"),
        (four("{0}_{2:04d}.jpg", "{} 1\n{} 1", "{} -1\n{} -1"), "CPLFW"),
        (four("{0}/{0}_{2:04d}.jpg", "{} {} 1", "{} {} 0"), "path path label"),
        (four("{0}/{0}_{2:04d}.jpg", "{}\t{}\tTrue", "{}\t{}\tFalse", "a\tb\tissame\n"), "path path label.*issame"),
        (four("{0}/{0}_{2:04d}.jpg", '"{}",{},1.0', "{},{},0.0", "first,second,label\n"), "path path label"),
        (four("{0}\\{0}_{2:04d}.jpg", "{};{};1", "{};{};-1"), "path path label"),
        (four("./{0}/{0}_{2:04d}.PNG", "1 {} {}", "0 {} {}"), "label path path"),
    ],
)
@pytest.mark.parametrize("name", ["pairs.txt", "list.CSV", "set"])
def test_every_form_gives_the_same_pairs(tmp_path, text, form, name):
    people(tmp_path / "aligned", {"Ann": range(1, 5), "Bo": [1]})
    (tmp_path / name).write_text(text, newline="")
    pairs = read_pairs(tmp_path / name)
    assert shown(pairs) == FOUR
    assert pairs.files[3] == tmp_path / "aligned/Bo/Bo_0001.jpg"
    assert re.search(form, pairs.summary)
    assert "2 genuine and 2 impostor pairs, in 10 folds" in pairs.summary


@pytest.mark.parametrize(
    ("suffix", "flat"),
    [(".jpg", False), (".JPG", True), (".png", False), (".Tiff", False), (".pgm", True), (".webp", 0)],
)
@pytest.mark.parametrize(
    "text", ["1\nAnn 1 2\nAnn 1 Bo 1\n", "Ann_0001.jpg 3\nAnn_0002.jpg 3\nAnn_0001.jpg 0\nBo_0001.jpg 0\n"]
)
def test_images_of_any_kind(tmp_path, suffix, flat, text):
    names = {"Ann": (1, 2), "Bo": (1,)}
    people(tmp_path / "all", names, suffix)
    if flat or text.startswith("Ann_"):
        for file in list((tmp_path / "all").rglob(f"*{suffix}")):
            file.rename(tmp_path / "all" / file.name)
    (tmp_path / "pairs.txt").write_text(text)
    assert shown(read_pairs(tmp_path / "pairs.txt")) == [("Ann 1", "Ann 2", True), ("Ann 1", "Bo 1", False)]


def test_files_of_facenets_alignment_and_of_two_kinds(tmp_path):
    people(tmp_path, {"Ann": [1], "Bo": [1, 2]}, ".png")
    (tmp_path / "Ann/Ann_0001.png").rename(tmp_path / "Ann/Ann_0001_0.png")
    (tmp_path / "Bo/Bo_0001.jpg").write_text("a JPEG of Bo 1")
    (tmp_path / "pairs.txt").write_text("Bo 1 2\nAnn 1 Bo 1\n")
    assert shown(read_pairs(tmp_path / "pairs.txt"))[1] == ("Ann 1", "a JPEG of Bo 1", False)
    (tmp_path / "paths.txt").write_text("Bo/Bo_0001.PNG Bo/Bo_0002.jpg 1\nBo/Bo_0001.jpg Ann/Ann_0001_0.bmp 0\n")
    pairs = read_pairs(tmp_path / "paths.txt")
    assert shown(pairs) == [("Bo 1", "Bo 2", True), ("a JPEG of Bo 1", "Ann 1", False)]
    assert any("3 images are under names that are spelled otherwise" in warning for warning in pairs.warnings)


E_NFC, E_NFD = unicodedata.normalize("NFC", "José"), unicodedata.normalize("NFD", "José")
LATIN = "Jos\udce9"  # the byte E9, as Python keeps it
NAMES = [
    *("a b", " a", "a ", "~", "-x", "#x", "[b]x", "%s", "{x}", "a,b", "a;b", "'q'", '"q"', "back\\slash", "x.jpg"),
    *(".hidden", "a..b", "*", "?", "\x85next", "\u2028", "nbsp\xa0x", "rtl\u202ex", "\U0001f600", "\x1b[31m", "\x0bvt"),
    *("UPPER", "l" * 200, "1", "\u0130", "a\ufeffbom", E_NFC, E_NFD, LATIN),
]
assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_of_a_file_system(tmp_path, name):
    (tmp_path / "faces" / name).mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / "faces" / name / f"{name}_{number:04d}.jpg").write_text(str(number))
    lists = {
        "paths": "{0}_0001.jpg\t{0}_0002.jpg\t1\n{0}_0002.jpg\t{0}_0001.jpg\t0\n".format(f"{name}/{name}"),
        "lfw": f"{name}\t1\t2\n{name}\t2\t{name}\t1\n",
    }
    for form, text in lists.items():
        # The list too has the name.
        file = tmp_path / f"{name}.{form}.txt"
        file.write_bytes(os.fsencode(text))
        pairs = read_pairs(file, tmp_path / "faces")
        assert [image.decode() for image in pairs.images] == ["1", "2", "2", "1"], form
        for said in (pairs.name, pairs.summary, pairs.describe(1), *pairs.warnings):
            assert said.isprintable() and json.dumps(said).isascii() and said.encode("utf-8")


@pytest.mark.parametrize("spelled", [E_NFC, E_NFD, LATIN], ids=["NFC", "NFD", "Latin-1"])
@pytest.mark.parametrize("on_disk", [E_NFC, E_NFD, LATIN], ids=["NFC", "NFD", "Latin-1"])
def test_a_name_is_found_in_its_other_spellings(tmp_path, spelled, on_disk):
    people(tmp_path / "faces", {on_disk: ()})
    for number in (1, 2):
        (tmp_path / "faces" / on_disk / f"{on_disk}_000{number}.jpg").write_text(str(number))
    (tmp_path / "pairs.txt").write_bytes(os.fsencode(f"{spelled} 1 2\n{spelled} 2 {spelled} 1\n"))
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.images == [b"1", b"2", b"2", b"1"]
    assert ("Latin-1" in pairs.summary) == (spelled == LATIN)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    people(tmp_path, {"José": [1, 2]})
    (tmp_path / "pairs.txt").write_bytes(f"José 1 2{end}José 2 José 1{end}".encode(encoding))
    assert read_pairs(tmp_path / "pairs.txt").images[:2] == ["José 1".encode(), "José 2".encode()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Ann 1 2\nAnn\x00 1 2\n", "line 2 has a NUL byte; .*Save a list as UTF-8"),
        ("Ann 1 2\n".encode("utf-16-le"), "line 1 has a NUL byte"),
        (b"\xff\xfeA", "broken UTF-16"),
        (b" \n\n", "no line"),
        (b"<html><body>log in to go on</body></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 345\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"some words\nand others here\n", "no list of pairs: line 1 is 'some words'; .*path path label"),
        (b"Ann 1 2\nAnn 1 2\nAnn 1 2\nAnn \x1b[31m\xe9 x\n", r"line 4 is 'Ann \\x1b\[31m\\udce9 x', not .*LFW"),
        (b"a.jpg b.jpg 1\na.jpg b.jpg 0\na.jpg b.jpg 2\n", "line 3 is 'a.jpg b.jpg 2', not `path path label`"),
        (b"a.jpg b.jpg 1\na.jpg b.jpg 0\na.jpg b.jpg -1\n", "line 2 has the label 0 and line 3 has -1"),
        (b"a.jpg 1\nb.jpg 1\nc.jpg 0\nd.jpg 0\ne.jpg 1\n", "line 5 has no second one"),
        (b"a.jpg 1\nb.jpg 1\nc.jpg 0\nd.jpg 1\n", "lines 3 and 4 are one pair, but have the labels 0 and 1"),
        (b"a\nb.jpg\tc.jpg\t1\nd.jpg\te.jpg\t0\nf.jpg\tg.jpg\t0\n", "line 1 is 'a', not"),
        (b"2\nAnn 1 2\nAnn 1 Bo 1\n", "2 pairs, but the first line announces 2 x 1 x 2"),
        (b"1\nAnn 1 2\nAnn 1 2\n", "2 genuine pairs"),
        (b"1\nAnn 1 2\nAnn 1 Bo\n", "line 3 is 'Ann 1 Bo', not"),
        (b"1\nAnn 1 2\nAnn 1 Bo 1 7\n", "line 3 is 'Ann 1 Bo 1 7', not"),
        (b"1\n../Ann 1 3\nAnn 1 Bo 1\n", "line 2: a person's name must be the name of a folder, not '../Ann'"),
        (b"1\n.. 1 3\nAnn 1 Bo 1\n", "must be the name of a folder"),
        (
            b"1\nCy 1 2\nCy 1 Di 1\n",
            "no image Cy/Cy_0001 .* folder in it; put the images' folder .* evaluation.image_folder",
        ),
    ],
)
def test_says_what_is_wrong_with_a_list(tmp_path, content, message):
    people(tmp_path / "faces", {"Ann": [1, 2], "Bo": [1]})
    (tmp_path / "pairs.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"pairs\.txt: .*{message}"):
        read_pairs(tmp_path / "pairs.txt")


def test_a_list_goes_without_its_first_line_where_that_is_wrong(tmp_path):
    people(tmp_path, {"Ann": [1, 2], "Bo": [1, 2]})
    (tmp_path / "pairs.txt").write_text("10 300\nAnn 1 2\nBo 1 2\nAnn 1 Bo 1\n")
    with pytest.raises(UserError, match=r"the first line announces 2 x 10 x 300; .* remove that line"):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text("Ann 1 2\nBo 1 2\nAnn 1 Bo 1\n")
    assert read_pairs(tmp_path / "pairs.txt").same.tolist() == [True, True, False]


def test_missing_images_are_counted_and_named_and_may_be_left_out(tmp_path):
    people(tmp_path / "faces", {"Ann": range(1, 5), "Bo": [1]})
    (tmp_path / "faces/Ann/Ann_0004.jpg").write_bytes(b"")
    (tmp_path / "pairs.txt").write_text("Cy 1 2\nAnn 1 2\nAnn 1 Bo 1\nAnn 3 4\nBo 1 Ann 9\nAnn 2 Bo 1\n")
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "pairs.txt")
    text = str(caught.value)
    assert "4 of 12 images cannot be used" in text
    assert "image 1 of pair 1 in line 1" in text and "Cy_0001): no such file" in text
    assert "Ann_0004.jpg): the file is empty" in text and "and 1 more" in text
    assert "evaluation.missing_images=skip" in text and "--skip-missing" in text
    pairs = read_pairs(tmp_path / "pairs.txt", missing="skip")
    assert shown(pairs) == [("Ann 1", "Ann 2", True), ("Ann 1", "Bo 1", False), ("Ann 2", "Bo 1", False)]
    assert "image 2 of pair 6 in line 6" in pairs.describe(5)
    assert "3 of 6 pairs left out, for 4 of 12 images" in pairs.warnings[0]
    (tmp_path / "few.txt").write_text("Ann 4 5\nCy 1 Bo 1\nDi 1 2\n")
    with pytest.raises(UserError, match=r"the set holds no pairs; .*3 of 3 pairs left out"):
        read_pairs(tmp_path / "few.txt", missing="skip")


def test_the_folder_is_the_one_with_most_of_the_images(tmp_path):
    people(tmp_path / "a", {"Ann": [1]})
    people(tmp_path / "b", {"Ann": [1, 2], "Bo": [1]})
    (tmp_path / "pairs.txt").write_text("Ann 1 2\nAnn 1 Bo 1\n")
    assert read_pairs(tmp_path / "pairs.txt").files[0].parents[1] == tmp_path / "b"
    with pytest.raises(UserError, match="2 of 4 images cannot be used"):
        read_pairs(tmp_path / "pairs.txt", tmp_path / "a")
    with pytest.raises(UserError, match=r"no image Ann/Ann_0001 .* in .*none"):
        read_pairs(tmp_path / "pairs.txt", tmp_path / "none")


def test_lists_of_genuine_pairs_first_are_spread_over_the_folds(tmp_path):
    people(tmp_path, {"Ann": range(1, 41), "Bo": [1]})
    genuine = [f"Ann {number} {number % 40 + 1}\n" for number in range(1, 21)]
    impostors = [f"Ann {number} Bo 1\n" for number in range(1, 21)]
    (tmp_path / "pairs.txt").write_text("".join(genuine + impostors))
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert [fold.sum() for fold in np.array_split(pairs.same, 10)] == [2] * 10
    assert [pair[0] for pair in shown(pairs) if pair[2]] == [f"Ann {number}" for number in range(1, 21)]
    assert "spread over the folds" in pairs.summary
    # One that is even keeps its order.
    turns = [line for pair in zip(impostors, genuine, strict=True) for line in pair]
    (tmp_path / "pairs.txt").write_text("".join(turns))
    assert read_pairs(tmp_path / "pairs.txt").same.tolist() == [False, True] * 20


def test_repeated_pairs_are_counted(tmp_path):
    people(tmp_path, {"Ann": range(1, 5), "Bo": [1]})
    lines = ["Ann 1 2", "Ann 2 1", "Ann 1 2", "Ann 3 3", "Ann 3 Bo 1"]
    (tmp_path / "pairs.txt").write_text("\n".join([*lines, ""]))
    assert read_pairs(tmp_path / "pairs.txt").warnings == [
        "2 of 5 pairs are in the set already, and count each time",
        "1 of 5 pairs are of an image and itself",
    ]
    (tmp_path / "both.txt").write_text("Ann/Ann_0001.jpg Bo/Bo_0001.jpg 1\nBo/Bo_0001.jpg Ann/Ann_0001.jpg 0\n")
    assert "1 of 2 pairs are in the set both as genuine and as impostor" in read_pairs(tmp_path / "both.txt").warnings


def test_lfw_text_matches_the_bin_made_from_it(shared_data, tmp_path):
    source = shared_data / "lfw-split"
    expected = read_pairs(source / "dev_fold9.bin")
    text = (source / "dev_fold9_pairs.txt").read_text()
    lines = [line.split() for line in text.splitlines()[1:]]
    genuine, impostors = (iter(np.flatnonzero(expected.same == kind)) for kind in (True, False))
    for fields in lines:
        pair = int(next(genuine if len(fields) == 3 else impostors))
        for image, (name, number) in enumerate([fields[:2], fields[-2:] if len(fields) == 4 else fields[::2]]):
            file = tmp_path / "aligned" / name / f"{name}_{int(number):04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(expected.images[2 * pair + image])
    (tmp_path / "pairs.txt").write_text(text)
    for pairs in (read_pairs(tmp_path / "pairs.txt"), read_pairs(tmp_path / "pairs.txt", tmp_path / "aligned")):
        assert pairs.images == expected.images
        assert pairs.same.tolist() == expected.same.tolist()
        assert pairs.files[1].parent.parent == tmp_path / "aligned"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".jpeg"])
def test_ten_sets_keep_the_order_of_the_file(tmp_path, suffix):
    people(tmp_path, {"Ann": range(1, 5), "Bo_B": [1]}, suffix)
    block = "Ann\t1\t2\nAnn\t3\t4\nAnn\t2\tBo_B\t1\nBo_B\t1\tAnn\t4\n"
    (tmp_path / "pairs.txt").write_text("10\t2\n" + block * 10)
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.same.tolist() == [True, True, False, False] * 10
    assert pairs.images[:8] == [b"Ann 1", b"Ann 2", b"Ann 3", b"Ann 4", b"Ann 2", b"Bo_B 1", b"Bo_B 1", b"Ann 4"]
    assert "image 2 of pair 3" in pairs.describe(5)
    assert "Bo_B_0001" in pairs.describe(5)


@pytest.mark.parametrize("header", ["2", "1 2", "2 1"])
def test_other_numbers_of_sets_take_turns(tmp_path, header):
    people(tmp_path / "faces", {"Ann": range(1, 5), "Bo": [1]})
    (tmp_path / "pairs.txt").write_text(f"{header}\nAnn 1 2\nAnn 3 4\nAnn 2 Bo 1\nBo 1 Ann 4\n")
    pairs = read_pairs(tmp_path / "pairs.txt")
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.images[2:6] == [b"Ann 2", b"Bo 1", b"Ann 3", b"Ann 4"]
