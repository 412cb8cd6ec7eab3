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
