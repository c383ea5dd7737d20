"""Puts `configs/` into a wheel, as `fedjax_sec/_configs/`; pyproject.toml has everything else.

An editable install reads the checkout's own folder, so nothing is copied there.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).parent / "configs"


class BuildWithConfigs(build_py):
    """`build_py` that copies the configurations as well."""

    def _targets(self) -> dict[Path, Path]:
        folder = Path(self.build_lib) / "fedjax_sec" / "_configs"
        return {path: folder / path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._targets().items():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        copied = [] if self.editable_mode else map(str, self._targets().values())
        return [*super().get_outputs(include_bytecode), *copied]


setup(cmdclass={"build_py": BuildWithConfigs})
