"""The direction of imports: who may know of whom."""

import ast
import subprocess
import sys
from pathlib import Path

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


def imports() -> list[tuple[str, str]]:
    """Pairs of (importer, imported), each a first name below `recognition`."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(importer, name.split(".")[1]) for name in names if name.startswith("recognition.")]
    return [pair for pair in found if pair[0] != pair[1]]


def test_imports_point_downwards() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    pairs = imports()
    assert ("training", "head") in pairs
    upwards = {(a, b) for a, b in pairs if a != "__init__" and level[a] <= level[b]}
    assert upwards <= {("deploy", "evaluation")}, upwards


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


def modules() -> dict[str, set[str]]:
    """The modules of the package, and those of them that each imports."""
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in paths else node.module for name in full}
    return {module: (names & paths.keys()) - {module} for module, names in found.items()}


def test_no_two_modules_import_each_other() -> None:
    left = modules()
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left


def importers(of: str) -> set[str]:
    """The modules outside `of` that import something in it."""
    return {
        module
        for module, names in modules().items()
        if not f"{module}.".startswith(f"{of}.") and any(f"{name}.".startswith(f"{of}.") for name in names)
    }


def test_losses_and_class_weights_know_nothing_of_backends() -> None:
    found = importers("recognition.head.backends")
    assert found
    assert not [
        name for name in found if name.startswith(("recognition.head.losses", "recognition.head.class_weights"))
    ]


def test_nothing_below_the_programs_plans_or_measures() -> None:
    programs = ("recognition.cli", "recognition.benchmarks")
    assert not [name for name in importers("recognition.benchmarks") if not name.startswith(programs[:1])]
    assert not [name for name in importers("recognition.planning") if not name.startswith(programs)]


def test_verification_of_an_onnx_file_needs_no_torch() -> None:
    code = (
        "import sys, recognition.deploy.onnx_embedder, recognition.evaluation.verification_sets\n"
        "assert not {'torch', 'timm', 'nvidia.dali', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_a_file_has_fewer_than_400_lines() -> None:
    lines = {path: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert len(lines) > 100
    assert not {str(path): count for path, count in lines.items() if count >= 400}
