import tomllib
from collections.abc import Callable
from pathlib import Path

import pydantic
import pytest

from recognition import config
from recognition.config import Config, ConfigError, load
from recognition.config.base import Section
from recognition.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
DATA = '[data]\npath = "faces"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def mistakes(path: Path, *overrides: str, check_paths: bool = False) -> list[str]:
    """The mistakes that `load` reports, after a first line that counts them."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides, check_paths=check_paths)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{path}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_round_trips(path: Path, write: Write) -> None:
    recipe = load(path, check_paths=False)
    assert load(write(recipe.to_toml()), check_paths=False) == recipe


def test_the_least_file_gives_the_defaults(write: Write) -> None:
    settings = load(write(DATA), check_paths=False)
    assert settings.data.path == Path("faces")
    assert settings.backbone == config.Backbone() and settings.optimizer == config.SGD()
    assert settings.head.loss == config.ArcFace(scale=64.0, margin=0.5)
    assert settings.training.schedule == "polynomial" and settings.evaluation.pairs == ()


def test_values_of_file_and_overrides(write: Write) -> None:
    path = write(DATA + '[training]\nepochs = 3\nglobal_batch = 64\n[backbone]\nname = "mobilefacenet"\n')
    overrides = [
        "training.global_batch=128",
        "training.schedule=cosine",
        'run.folder="runs/a b"',
        "data.path=other faces/train.rec",
        "data.augment.zoom=0.1",
        "backbone.options={drop_path_rate = 0.05, norm = true}",
        "backbone.options.act_layer=gelu",
    ]
    settings = load(path, overrides, check_paths=False)
    assert (settings.training.epochs, settings.training.global_batch) == (3.0, 128)
    assert settings.training.schedule == "cosine"
    assert (settings.run.folder, settings.data.path) == (Path("runs/a b"), Path("other faces/train.rec"))
    assert settings.data.augment == config.Augment(zoom=0.1)
    assert settings.backbone.name == "mobilefacenet"
    assert settings.backbone.options == {"drop_path_rate": 0.05, "norm": True, "act_layer": "gelu"}
    assert settings.backbone.options["norm"] is True


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("traning.epochs=3", "traning: unknown key; did you mean training?"),
        ("training.epoch=3", "training.epoch: unknown key; did you mean epochs?"),
        ("data.augment.rotate=3", "data.augment.rotate: unknown key; did you mean rotate_degrees?"),
        ("tracking.wandb=true", "tracking.wandb: unknown key; known: every_steps, preview_images"),
    ],
)
def test_an_unknown_key_comes_with_what_was_meant(write: Write, override: str, mistake: str) -> None:
    assert mistakes(write(DATA), override) == [mistake]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("training.global_batch=1.5", "training.global_batch: input should be a valid integer, not 1.5"),
        ("training.global_batch=64.0", "training.global_batch: input should be a valid integer, not 64.0"),
        ("training.global_batch=many", 'training.global_batch: input should be a valid integer, not "many"'),
        ("training.global_batch=0", "training.global_batch: input should be greater than 0, not 0"),
        ("run.seed=true", "run.seed: input should be a valid integer, not true"),
        ('run.seed="3"', 'run.seed: input should be a valid integer, not "3"'),
        ("export.enabled=1", "export.enabled: input should be a valid boolean, not 1"),
        ("backbone.compile=yes", "backbone.compile: input should be 'auto', True or False, not \"yes\""),
        (
            "backbone.precision=half",
            "backbone.precision: input should be 'auto', 'float32', 'bfloat16' or 'float16', not \"half\"",
        ),
        ("head.sample_rate=-1", "head.sample_rate: input should be greater than or equal to 0, not -1"),
        ("data.augment.flip=1.01", "data.augment.flip: input should be less than or equal to 1, not 1.01"),
        ("training.epochs=inf", "training.epochs: input should be a finite number, not Infinity"),
        ("training.epochs=nan", "training.epochs: input should be a finite number, not NaN"),
        ("training.clip_norm=-inf", "training.clip_norm: input should be a finite number, not -Infinity"),
    ],
)
def test_a_value_of_the_wrong_kind_or_size(write: Write, override: str, mistake: str) -> None:
    assert mistakes(write(DATA), override) == [mistake]


@pytest.mark.parametrize("override", ["nonsense", "training.epochs", "epochs=3", ".epochs=3", "training.=3", "=3", ""])
def test_an_override_that_is_none(write: Write, override: str) -> None:
    assert mistakes(write(DATA), override) == [f"{override}: an override is written section.key=value".strip()]


def test_an_override_through_a_value(write: Write) -> None:
    assert mistakes(write(DATA), "data.path.x=3") == ["data.path.x=3: data.path is a value, not a section"]


def test_all_mistakes_are_told_at_once(write: Write) -> None:
    path = write('[run]\nseed = -1\n[head.loss]\nname = "cosface"\nmargn = 0.3\n[training]\npower = "two"\n')
    assert mistakes(path, "nonsense", "checkpoint.keep=0") == [
        "nonsense: an override is written section.key=value",
        "run.seed: input should be greater than or equal to 0, not -1",
        "data: missing",
        "head.loss.margn: unknown key; did you mean margin?",
        'training.power: input should be a valid number, not "two"',
        "checkpoint.keep: input should be greater than or equal to 1, not 0",
    ]


@pytest.mark.parametrize(
    ("overrides", "loss"),
    [
        (["head.loss.name=softmax"], config.Softmax()),
        (["head.loss.name=normface", "head.loss.scale=30"], config.NormFace(scale=30.0)),
        (["head.loss.name=cosface", "head.loss.margin=0.35"], config.CosFace(margin=0.35)),
        (["head.loss.name=arcface", "head.loss.straight_through=true"], config.ArcFace(straight_through=True)),
        (["head.loss.name=combined", "head.loss.m3=0.1"], config.Combined(m3=0.1)),
        (["head.loss.name=sphereface_r", "head.loss.version=2"], config.SphereFaceR(version=2)),
        (["head.loss.name=mv_softmax", 'head.loss.base="arcface"'], config.MVSoftmax(base="arcface")),
        (["head.loss.name=uce"], config.UCE()),
    ],
)
def test_the_variants_of_a_loss(write: Write, overrides: list[str], loss: config.Loss) -> None:
    assert load(write(DATA), overrides, check_paths=False).head.loss == loss


def test_a_variant_is_judged_by_its_own_fields(write: Write) -> None:
    path = write(DATA + '[head.loss]\nname = "cosface"\n')
    assert mistakes(path, "head.loss.m1=2.0") == ["head.loss.m1: unknown key; known: scale, name, margin"]
    assert mistakes(path, "head.loss.margin=-1") == [
        "head.loss.margin: input should be greater than or equal to 0, not -1"
    ]


def test_a_variant_that_does_not_exist(write: Write) -> None:
    (mistake,) = mistakes(write(DATA), "head.loss.name=arcfac")
    assert mistake.startswith("head.loss.name: ") and "'arcfac'" in mistake
    assert all(f"'{name}'" in mistake for name in ("softmax", "normface", "cosface", "arcface", "combined"))


def test_another_variant_drops_the_fields_of_the_one_before(write: Write) -> None:
    path = write(DATA + '[optimizer]\nname = "sgd"\nmomentum = 0.8\n')
    settings = load(path, ["optimizer.name=adamw", "optimizer.lr=0.002"], check_paths=False)
    assert settings.optimizer == config.AdamW(lr=0.002)
    same = load(path, ["optimizer.name=sgd"], check_paths=False)
    assert same.optimizer == config.SGD(momentum=0.8)


def test_the_class_weights_follow_the_backbone_s_optimizer_or_their_own(write: Write) -> None:
    settings = load(write(DATA + '[optimizer]\nname = "sgd"\nlr = 0.3\n'), check_paths=False)
    assert settings.head_optimizer == config.SGD(lr=0.3)
    own = ["optimizer.name=adamw", "head.optimizer.name=sgd", "head.optimizer.lr=0.2"]
    assert load(write(DATA), own, check_paths=False).head_optimizer == config.SGD(lr=0.2)
    assert mistakes(write(DATA), "head.optimizer.lr=0.2") == ["head.optimizer.name: missing"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["optimizer.name=adamw", "head.inactive_rows=lazy"], "set head.optimizer.name to sgd"),
        (["head.loss.name=softmax", "head.filter.threshold=0.4"], "head.filter needs a loss on cosines"),
        (["head.loss.name=sphereface", "head.subcenters=3"], "head.subcenters needs a loss on cosines"),
        (["head.triplet.margin=0.3"], "head.triplet needs several images of an identity"),
        (["data.images_per_identity=3", "training.global_batch=64"], "must divide by data.images_per_identity"),
        (["head.loss.name=magface", "head.loss.lower_norm=120"], "lower_norm must be below upper_norm"),
        (["head.sample_rate=1.5"], "head.sample_rate"),
    ],
)
def test_settings_of_the_head_that_do_not_go_together(write: Write, overrides: list[str], part: str) -> None:
    (mistake,) = mistakes(write(DATA), *overrides)
    assert part in mistake


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.global_batch=100", "training.accumulation_steps=3"], ["(100)", "training.accumulation_steps (3)"]),
        (["training.schedule=multistep"], ["multistep needs training.milestones, for example [10.0, 16.0]"]),
        (["training.milestones=[10.0]"], ["training.milestones is for training.schedule = multistep, not polynomial"]),
        (
            ["training.schedule=multistep", "training.milestones=[12.0, 8.0]"],
            ["training.milestones must rise, which [12.0, 8.0] do not"],
        ),
        (
            ["training.schedule=multistep", "training.milestones=[1, 20]", "training.warmup_epochs=1"],
            ["training.milestones: 1.0, 20.0 not between training.warmup_epochs (1.0) and training.epochs (20.0)"],
        ),
        (["export.opset=10"], ["export.opset: input should be greater than or equal to 11, not 10"]),
        (["training.epochs=2", "training.warmup_epochs=2"], ["training.warmup_epochs (2.0)", "training.epochs (2.0)"]),
    ],
)
def test_fields_that_contradict_each_other(write: Write, overrides: list[str], words: list[str]) -> None:
    (mistake,) = mistakes(write(DATA), *overrides)
    assert all(word in mistake for word in words)


def test_input_paths_are_looked_for_only_when_asked(write: Write, tmp_path: Path) -> None:
    absent, present = tmp_path / "absent", tmp_path / "lfw.bin"
    present.write_bytes(b"")
    text = f'[data]\npath = "{absent}"\n[evaluation]\npairs = ["{present}", "{absent}.bin"]\n'
    path = write(text + f'[backbone]\nweights = "{absent}.pth"\n')
    assert mistakes(path, check_paths=True) == [
        f"data.path: no such file or folder: {absent}",
        f"backbone.weights: no such file or folder: {absent}.pth",
        f"evaluation.pairs.1: no such file or folder: {absent}.bin",
    ]
    assert load(path, check_paths=False).data.path == absent
    absent.mkdir()
    found = load(path, ["backbone.weights=" + str(present), "evaluation.pairs=" + str(present)])
    assert found.evaluation.pairs == (present,)


def test_pairs_are_one_path_or_several(write: Write) -> None:
    one = load(write(DATA), ["evaluation.pairs=sets/lfw.bin"], check_paths=False)
    assert one.evaluation.pairs == (Path("sets/lfw.bin"),)
    two = load(write(DATA), ['evaluation.pairs=["lfw.bin", "cfp.bin"]'], check_paths=False)
    assert two.evaluation.pairs == (Path("lfw.bin"), Path("cfp.bin"))


def test_what_is_written_is_toml_and_is_read_back_equal(write: Write) -> None:
    overrides = [
        'run.folder="runs/a \\"b\\" \\\\ é"',
        'backbone.options={drop_path_rate = 1e-7, patch = 8, flag = false, kind = "x"}',
        'evaluation.pairs=["a.bin", "b.bin"]',
        "optimizer.name=adamw",
        "optimizer.betas=[0.9, 0.98]",
        "optimizer.eps=1e-16",
        "head.optimizer.name=sgd",
        "head.loss.name=combined",
    ]
    settings = load(write(DATA), overrides, check_paths=False)
    text = settings.to_toml()
    assert load(write(text), check_paths=False) == settings
    tree = tomllib.loads(text)
    assert tree["run"]["folder"] == 'runs/a "b" \\ é'
    assert tree["optimizer"]["betas"] == [0.9, 0.98] and tree["optimizer"]["eps"] == 1e-16
    assert "weights" not in tree["backbone"] and tree["training"]["power"] == 1.0


def test_a_file_that_cannot_be_read_or_parsed(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file or directory"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML: .*line 2"):
        load(write("[data]\npath = = 3\n"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        load(tmp_path / "binary.toml")
    assert issubclass(ConfigError, UserError) and issubclass(UserError, ValueError)


def test_a_configuration_cannot_be_changed(write: Write) -> None:
    settings: Config = load(write(DATA), check_paths=False)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.training.epochs = 3.0  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    sections = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Section)]
    settings = [section for section in sections if section not in (Section, Config)]
    silent = [
        f"{section.__name__}.{name}"
        for section in settings
        for name, field in section.model_fields.items()
        if name != "name" and not field.description
    ]
    assert not silent and all(section.__doc__ for section in settings)


def test_another_name_of_a_section_without_variants_keeps_its_fields(write: Write) -> None:
    path = write(DATA + "[backbone]\nname = 'resnet18'\nembedding_size = 128\n")
    loaded = load(path, ["backbone.name=resnet34"], check_paths=False)
    assert (loaded.backbone.name, loaded.backbone.embedding_size) == ("resnet34", 128)


def test_the_order_of_overrides_does_not_matter(write: Write) -> None:
    loaded = load(write(DATA), ["head.loss.margin=0.3", "head.loss.name=cosface"], check_paths=False)
    assert loaded.head.loss == config.CosFace(margin=0.3)


def test_a_section_without_a_name_is_of_the_default_variant(write: Write) -> None:
    loaded = load(write(DATA), ["optimizer.lr=0.5", "head.loss.margin=0.3"], check_paths=False)
    assert (loaded.optimizer, loaded.head.loss) == (config.SGD(lr=0.5), config.ArcFace(margin=0.3))


def test_contradictions_between_sections_are_reported_together(write: Write) -> None:
    found = mistakes(
        write(DATA),
        "training.accumulation_steps=7",
        "training.warmup_epochs=40",
        "optimizer.name=adamw",
        "head.inactive_rows=lazy",
    )
    for mistake, part in zip(
        found, ("training.accumulation_steps (7)", "warmup_epochs (40.0)", "head.inactive_rows"), strict=True
    ):
        assert part in mistake
