"""Put the recipes of configs/ into the package that is installed; pyproject.toml has all else."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).parent / "configs"


class BuildWithRecipes(build_py):
    """Copies the recipes; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that are built."""
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._recipes())]

    def _recipes(self) -> list[tuple[str, str]]:
        folder = Path(self.build_lib) / "recognition" / "recipes"
        return [(str(path), str(folder / path.name)) for path in sorted(CONFIGS.glob("*.toml"))]


setup(cmdclass={"build_py": BuildWithRecipes})
