"""Two import packages from one tree: `electra_core` (the model) and `electra_kernels` (./kernels).

The kernels are imported as `electra_kernels` because a public package already owns `kernels`.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"electra_core": "electra_core", "electra_kernels": "kernels"},
    packages=[*find_packages(include=["electra_core", "electra_core.*"]), "electra_kernels"],
    package_data={
        "electra_core": ["py.typed", "tiny/*/*", "tiny/*", "assets/*"],
        "electra_kernels": ["py.typed", "c/*"],
    },
)
