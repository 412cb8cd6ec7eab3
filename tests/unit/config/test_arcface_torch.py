"""Conversion of arcface_torch's configurations."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from recognition import config
from recognition.config.arcface_torch import convert_file
from recognition.errors import UserError

SMALL = """
from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.5, 0.0)
config.network = "r18"
config.output = None
config.batch_size = 2 ** 5 * 4
config.rec = "/faces/small"
config.num_classes = 3 * 10
config.num_image = 600
config.num_epoch = 12
config.warmup_epoch = config.num_epoch // 4
config.val_targets = ["lfw", 'agedb_30']
"""


def convert(folder: Path, text: str = "", *, base: str | None = None, gpus: int = 8) -> tuple[config.Config, list[str]]:
    """Convert SMALL with further lines, and load the result."""
    path = folder / "small.py"
    path.write_text(SMALL + text)
    if base is not None:
        (folder / "base.py").write_text(base)
    conversion = convert_file(path, gpus=gpus)
    (folder / "small.toml").write_text(conversion.toml)
    comments = "".join(line[1:] for line in conversion.toml.splitlines() if line.startswith("#"))
    for note in conversion.notes:
        assert " ".join(note.split()) in " ".join(comments.split())
    return config.load(folder / "small.toml", check_paths=False), conversion.notes


def test_settings_of_a_small_run(tmp_path: Path) -> None:
    found, notes = convert(tmp_path)
    assert found.run.folder == Path("work_dirs/small") and found.run.seed == 2048
    assert found.backbone.name == "iresnet18" and found.backbone.precision == "float32"
    assert found.head.loss == config.ArcFace(margin=0.5, scale=64.0, straight_through=True)
    assert found.head.filter is None and found.head.sample_rate == 1 and found.head.inactive_rows == "sparse"
    assert found.training.global_batch == 128 * 8 and found.training.accumulation_steps == 1
    assert (found.training.epochs, found.training.warmup_epochs) == (12, 3)
    assert found.training.decay_norms_and_biases and found.training.clip_norm == 5
    assert found.optimizer == config.SGD(lr=0.1, momentum=0.9, weight_decay=5e-4)
    assert found.data.path == Path("/faces/small")
    assert found.evaluation.pairs == (Path("/faces/small/lfw.bin"), Path("/faces/small/agedb_30.bin"))
    assert any(note.startswith("num_classes = 30 and num_image = 600") for note in notes)
    assert found.data.augment == config.Augment()


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("config.margin_list = (1.0, 0.0, 0.4)", "head.loss", config.CosFace(margin=0.4)),
        ("config.margin_list = (1.0, 0.3, 0.2)", "head.loss", config.CosFace(margin=0.2)),
        ("config.margin_list = [1.35, 0.1, 0]", "head.loss", config.Combined(m1=1.35, m2=0.1, m3=0.0)),
        ("config.network = 'mbf'", "backbone.name", "mobilefacenet"),
        ("config.network = 'r200'", "backbone.name", "iresnet200"),
        ("config.network = 'vit_l_dp005_mask_005'", "backbone.options.embed_dim", 768),
        ("config.network = 'vit_t_dp005_mask0'", "backbone.options.drop_path_rate", 0.05),
        ("config.embedding_size = 256", "backbone.embedding_size", 256),
        ("config.fp16 = True", "backbone.precision", "float16"),
        ("config.fp16 = True", "training.loss_scale_growth_steps", 100),
        ("config.sample_rate = 0.1", "head.sample_rate", 0.1),
        ("config.sample_rate = 0", "head.sample_rate", 0.0),
        ("config.sample_rate = 0.1", "head.inactive_rows", "lazy"),
        ("config.sample_rate = 0.1\nconfig.optimizer = 'adamw'", "head.inactive_rows", "sparse"),
        ("config.interclass_filtering_threshold = 0.4", "head.filter", config.Filter(threshold=0.4, zero=True)),
        ("config.optimizer = 'adamw'\nconfig.lr = 1e-3", "optimizer", config.AdamW(lr=1e-3, weight_decay=5e-4)),
        ("config.momentum = 0.8", "optimizer.momentum", 0.9),
        ("config.warmup_epoch = -1", "training.warmup_epochs", 0.0),
        ("config.gradient_acc = 4", "training.global_batch", 128 * 8 * 4),
        ("config.gradient_acc = 4", "training.accumulation_steps", 4),
        ("config.gradient_acc = 4", "evaluation.every_steps", 500),
        ("config.verbose = 3000", "evaluation.every_steps", 3000),
        ("config.frequent = 7", "tracking.every_steps", 7),
        ("config.seed = 3", "run.seed", 3),
        ("config.output = 'runs/' + 'mine'", "run.folder", Path("runs/mine")),
        ("config.num_workers = 6", "data.threads", 6),
        ("config.dali = True", "data.loader", "dali"),
        ("config.dali = True\nconfig.dali_aug = True", "data.augment.gray", 0.1),
        ("config['lr'] = 0.3", "optimizer.lr", 0.3),
        ("config.lr = 0.1\nconfig.lr *= 2", "optimizer.lr", 0.2),
        ("rate: float = 0.05\nconfig.lr = rate * 4", "optimizer.lr", 0.2),
        ("config.rec = os.path.join('/faces', 'other')", "data.path", Path("/faces/other")),
    ],
)
def test_each_key_has_its_counterpart(tmp_path: Path, text: str, setting: str, value: Any) -> None:
    found: Any = convert(tmp_path, text)[0]
    for key in setting.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("config.margin_list = (1.0, 0.3, 0.2)", "leaves out m1 and m2 where m3 > 0"),
        ("config.margin_list = (1.35, 0.1, 0)", "arcface_torch refuses it"),
        ("config.network = 'vit_b'", "random masking of 10%"),
        ("config.network = 'vit_b_dp005_mask_005'", "random masking of 5%"),
        ("config.momentum = 0.8", "momentum = 0.8: arcface_torch does not read it"),
        ("config.gradient_acc = 4", "an lr 4 times as large"),
        ("config.optimizer = 'adamw'", "AdamW moves the class weights too"),
        ("config.sample_rate = 0.1\nconfig.optimizer = 'adamw'", "sample_rate: classes that take no part"),
        ("config.dali = True\nconfig.dali_aug = True", "no hue, blur"),
        ("config.rec = 'synthetic'", "set data.path"),
        ("config.lr_func = lambda epoch: 0.1", "lr_func, a function: left out"),
        ("def decay(step):\n    return 1\nconfig.decay = decay", "decay, a function: left out"),
        ("config.nonsense = 3", "nonsense: left out"),
        ("config.wandb_key = 'hidden'\nconfig.using_wandb = True", "wandb_key, using_wandb: no Weights & Biases"),
    ],
)
def test_differences_are_noted(tmp_path: Path, text: str, note: str) -> None:
    plain = convert(tmp_path)[1]
    notes = convert(tmp_path, text)[1]
    new = [each for each in notes if each not in plain]
    assert any(note in each for each in new), new
    assert "hidden" not in (tmp_path / "small.toml").read_text()


def test_the_folders_base_lies_below_the_file(tmp_path: Path) -> None:
    base = "config = edict()\nconfig.lr = 0.7\nconfig.network = 'r100'\nconfig.output = 'there'\nconfig.fp16 = True\n"
    found, _ = convert(tmp_path, base=base)
    assert (found.optimizer.lr, found.backbone.name, found.backbone.precision) == (0.7, "iresnet18", "float16")
    # An output of None in the file replaces base.py's.
    assert found.run.folder == Path("work_dirs/small")
    (tmp_path / "small.py").write_text(SMALL.replace("config.output = None\n", ""))
    assert tomllib.loads(convert_file(tmp_path / "small.py", gpus=1).toml)["run"]["folder"] == "there"


def test_batches_are_per_gpu(tmp_path: Path) -> None:
    assert [convert(tmp_path, gpus=gpus)[0].training.global_batch for gpus in (1, 3)] == [128, 384]
    with pytest.raises(UserError, match="gpus is 0"):
        convert(tmp_path, gpus=0)


def test_nothing_is_run(tmp_path: Path) -> None:
    left = tmp_path / "left"
    with pytest.raises(UserError, match="without running it"):
        convert(tmp_path, f"config.lr = open({str(left)!r}, 'w').write('1')")
    assert not left.exists()


LINES = SMALL.count("\n")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("config.lr = (", "not Python"),
        ("config.lr = float(os.environ['LR'])", "cannot read os.environ['LR'] without running it"),
        ("config.lr = 1 / 0", "cannot compute 1 / 0: division by zero"),
        ("config.lr = 9 ** 9 ** 9", "cannot compute 9 ** 9 ** 9"),
        ("config.seed = 'a' * 10 ** 12", "only numbers can be computed with"),
        ("config.lr = config.unknown", "config.unknown is read before it has a value"),
        ("config.lr = -0.1", "optimizer.lr: input should be greater than 0"),
        ("config.lr = 'fast'", "a number is expected, not 'fast'"),
        ("config.lr = True", "a number is expected, not True"),
        ("config.lr = lambda step: 1", "a number is expected, not a function"),
        ("config.batch_size = 0", "training.global_batch: input should be greater than 0"),
        ("config.gradient_acc = 0", "must be at least 1"),
        ("config.network = 'r2060'", "no counterpart; those with one are r18"),
        ("config.optimizer = 'lion'", "'sgd' or 'adamw' is expected"),
        ("config.margin_list = (1.0, 0.5)", "three numbers"),
        ("config.margin_list = (1.0, 9.0, 0.0)", "head.loss.margin: input should be less than 3.1415"),
        ("config.val_targets = [3]", "names of verification sets"),
        ("if True: config.lr = 1", "only assignments can be converted"),
        ("config.a.b = 1", "cannot follow config.a.b"),
        ("config = make()", "cannot follow config = make()"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(UserError, match=rf"small\.py:{LINES + 1}: .*{re.escape(part)}"):
        convert(tmp_path, text)


@pytest.mark.parametrize("content", [b"", b"x = 1\n", b"import os\n", b"config = edict()\n"])
def test_a_file_without_assignments(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.py").write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.py:1: no assignment such as config\.network"):
        convert_file(tmp_path / "empty.py", gpus=1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.py: No such file"):
        convert_file(tmp_path / "none.py", gpus=1)
    (tmp_path / "broken.py").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(UserError, match=r"broken\.py:1: not Python"):
        convert_file(tmp_path / "broken.py", gpus=1)
    (tmp_path / "short.py").write_text("config = edict()\nconfig.lr = 0.1\n")
    with pytest.raises(UserError, match=r"config\.rec has no value"):
        convert_file(tmp_path / "short.py", gpus=1)


@pytest.mark.parametrize("form", ["edict({})", "edict(dict({}))", "dict({})", "{}"])
def test_a_config_made_at_once(tmp_path: Path, form: str) -> None:
    keys = "{'rec': 'faces', 'num_epoch': 3, 'warmup_epoch': 0, 'val_targets': [], 'lr': 0.4}"
    (tmp_path / "once.py").write_text(f"config = {form.replace('{}', keys)}\n")
    tree = tomllib.loads(convert_file(tmp_path / "once.py", gpus=1).toml)
    assert tree["optimizer"]["lr"] == 0.4 and tree["data"]["path"] == "faces"
