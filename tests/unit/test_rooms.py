"""The rules of the house: who may import whom, and how large its rooms and files may be.

Each rule is a function from a package's folder to its violations, so that it can be seen to find them elsewhere.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "recognition"
ROOMS = {"data", "models", "head", "evaluation", "deploy"}
# Each knows those below it; the rooms do not know each other, but that deploy and evaluation share the Embedder.
LEVELS = [
    {"errors", "randomness", "images"},
    {"files"},
    {"config"},
    {"hardware", "tracking"},
    {"distributed"},
    ROOMS,
    {"runs", "planning"},
    {"training"},
    {"benchmarks"},
    {"cli"},
]
MOST_LINES, MOST_IN_HEAD, LARGEST_SHARE = 400, 8, 0.3


def modules(package: Path) -> dict[str, Path]:
    """Return the package's files by module name, such as `head.losses.base`; a folder's name is its `__init__`."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(parts).removesuffix("__init__").rstrip("."): path for path, parts in names.items()}


@cache
def imports(package: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports from the same package, at its top or inside of functions."""
    paths = modules(package)
    found: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                first, _, rest = name.partition(".")
                # The last part may be a module, or something in one.
                imported = rest if rest in paths else rest.rpartition(".")[0]
                if first == package.name and imported and imported in paths:
                    found[module].add(imported)
    return found


def pairs(package: Path) -> set[tuple[str, str]]:
    """Return (importer, imported) for all imports between modules."""
    return {(importer, name) for importer, imported in imports(package).items() for name in imported}


def room(module: str) -> str:
    """Return the first part of a module's name."""
    return module.partition(".")[0]


def inside(module: str, *rooms: str) -> bool:
    """Return whether a module lies in one of the rooms."""
    return any(f"{module}.".startswith(f"{name}.") for name in rooms)


def imports_that_point_upwards(package: Path) -> list[str]:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    between = {(room(a), room(b)) for a, b in pairs(package) if room(a) != room(b) and a} - {("deploy", "evaluation")}
    return [f"{a} imports {b}" for a, b in between if level[a] <= level[b]]


def imports_of_what_measures_or_plans(package: Path) -> list[str]:
    """Training must not need benchmarks nor planning: the command line alone imports them, and they each other."""
    aside = ("benchmarks", "planning")
    return [f"{a} imports {b}" for a, b in pairs(package) if inside(b, *aside) and not inside(a, "cli", *aside)]


def imports_of_backends(package: Path) -> list[str]:
    """Losses and class weights know nothing of how the classes are passed over."""
    below = ("head.losses", "head.class_weights")
    return [f"{a} imports {b}" for a, b in pairs(package) if inside(a, *below) and inside(b, "head.backends")]


def circles(package: Path) -> list[str]:
    try:
        TopologicalSorter(imports(package)).prepare()
    except CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def long_files(package: Path) -> list[str]:
    lines = {name: len(path.read_text().splitlines()) for name, path in modules(package).items()}
    return [f"{name} has {count} lines" for name, count in lines.items() if count > MOST_LINES]


def crowded_head(package: Path) -> list[str]:
    things = sorted({name.split(".")[1] for name in modules(package) if name.startswith("head.")})
    return [f"head has {len(things)} things at its top: {things}"] if len(things) > MOST_IN_HEAD else []


def large_rooms(package: Path) -> list[str]:
    lines: Counter[str] = Counter()
    for name, path in modules(package).items():
        lines[room(name)] += len(path.read_text().splitlines())
    return [
        f"{name} has {n} of {lines.total()} lines" for name, n in lines.items() if n > LARGEST_SHARE * lines.total()
    ]


RULES = [
    imports_that_point_upwards,
    imports_of_what_measures_or_plans,
    imports_of_backends,
    circles,
    long_files,
    crowded_head,
    large_rooms,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Callable[[Path], list[str]]) -> None:
    assert not rule(PACKAGE)


SMALL = {f"{name}/__init__.py": "" for name in ("data", "models", "runs", "training", "cli")}
"""Rooms of a package that keeps the rules, of a line each at most."""
BROKEN: list[tuple[Callable[[Path], list[str]], dict[str, str], str]] = [
    (
        imports_that_point_upwards,
        {"data/files.py": "def read():\n    from house.training import trainer\n", "training/trainer.py": ""},
        "data imports training",
    ),
    (imports_that_point_upwards, {"data/files.py": "import house.models"}, "data imports models"),
    (
        imports_of_what_measures_or_plans,
        {"training/trainer.py": "from house.planning.head import HeadPlan", "planning/head.py": ""},
        "training.trainer imports planning.head",
    ),
    (
        imports_of_backends,
        {"head/losses/base.py": "from house.head import backends", "head/backends/__init__.py": ""},
        "head.losses.base imports head.backends",
    ),
    (
        circles,
        {
            "data/a.py": "from house.data import b",
            "data/b.py": "from house.data.c import d",
            "data/c.py": "import house.data.a",
        },
        "imports data.a",
    ),
    (long_files, {"data/files.py": "\n" * 401}, "data.files has 401 lines"),
    (crowded_head, {f"head/{name}.py": "" for name in "abcdefghi"}, "head has 9 things"),
    (
        large_rooms,
        {f"{name}/a.py": "\n" * (2 if name == "data" else 1) for name in ("data", "models", "runs", "cli")},
        "data has 2 of 5",
    ),
]


@pytest.mark.parametrize(("rule", "files", "violation"), BROKEN, ids=[rule.__name__ for rule, *_ in BROKEN])
def test_a_rule_finds_what_breaks_it(
    rule: Callable[[Path], list[str]], files: dict[str, str], violation: str, tmp_path: Path
) -> None:
    package = tmp_path / "house"
    for name, text in (SMALL | files).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    [found] = rule(package)
    assert violation in found
    # Nothing else is broken.
    assert not [other.__name__ for other in RULES if other not in (rule, large_rooms) and other(package)]


def test_the_rules_see_the_imports() -> None:
    found = imports(PACKAGE)
    assert "head.class_weights.shard" in found["head.class_weights.gradient"]
    assert "config" in found["head.sharded_softmax"]
    # Within a function.
    assert "head.class_weights.update_kernel" in found["head.class_weights.fused_update"]


def test_evaluation_and_deployment_need_neither_dali_nor_a_training() -> None:
    code = "\n".join(
        [
            "import sys",
            "import recognition.deploy.export, recognition.deploy.onnx_embedder, recognition.runs.folder",
            "import recognition.evaluation.verification",
            "assert not [name for name in sys.modules if name.startswith(('nvidia.dali', 'recognition.data'))]",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_verification_of_an_onnx_file_needs_no_torch() -> None:
    code = (
        "import sys, recognition.deploy.onnx_embedder, recognition.evaluation.verification_sets\n"
        "assert not {'torch', 'timm', 'nvidia.dali', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
