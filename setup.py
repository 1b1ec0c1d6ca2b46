"""Two import packages from one tree: `electra_core` (the model) and `electra_kernels` (./kernels).

The kernels are imported as `electra_kernels` because a public package already owns `kernels`.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist


class BuildPy(build_py):
    """Builds without the modules in build/ that are no longer in the tree: what an earlier `pip install .` of this
    checkout left there would be installed, too.
    """

    def run(self):
        """Copies the packages into build/, and removes what was there besides."""
        super().run()
        built = {Path(name).resolve() for name in self.get_outputs(include_bytecode=False)}
        for package in {name.partition(".")[0] for name in self.packages}:
            for module in Path(self.build_lib, package).rglob("*.py"):
                if module.resolve() not in built:
                    module.unlink()


class Sdist(sdist):
    """Archives a whole clone: its tests need their helpers, README its pages."""

    def make_distribution(self):
        """Adds to what setuptools finds by itself (MANIFEST.in would do so, too, as one more file at the top)."""
        for name in ("Makefile", "constraints.txt"):
            self.filelist.include(name)
        for folder in ("benchmarks", "docs", "tests"):
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.py[cod]")
        super().make_distribution()


setup(
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
    package_dir={"electra_core": "electra_core", "electra_kernels": "kernels"},
    packages=[*find_packages(include=["electra_core", "electra_core.*"]), "electra_kernels"],
    include_package_data=False,  # only what is named below: setuptools warns of every other folder
    package_data={
        "electra_core": ["py.typed", "tiny/*/*", "tiny/*", "assets/*"],
        "electra_kernels": ["py.typed", "c/*"],
    },
)
