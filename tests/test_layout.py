"""How the project is laid out: which module may import which, what a wheel holds, types and docstrings."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.machinery
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from electra_core.version import source_digest

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "electra_core").rglob("*.py"))
ROOMS = sorted(path.parent for path in (ROOT / "electra_core").glob("*/__init__.py"))
"""The folders of electra_core."""
KERNELS = sorted((ROOT / "kernels").glob("*.py"))

MODEL = ("encoder", "electra", "objectives", "tasks", "packing", "initialisation")
"""The model: tensors in, tensors out."""
ABOVE_THE_MODEL = {
    "training", "pretrain", "finetune", "predict", "prepare", "demo", "cli", "model_dir", "checkpoint", "corpus",
    "examples", "tokenizer", "execution.distributed", "execution.placement", "execution.torchrun",
}  # fmt: skip
ROOMS_ABOVE_THE_MODEL = {
    "commands", "conversion", "corpora", "downstream", "files", "finetuning", "hub", "labelled_data",
    "pretraining", "reports", "runs", "tracing",
}  # fmt: skip


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    """Without the package: training, execution.engine."""
    return ".".join(path.relative_to(ROOT / "electra_core").with_suffix("").parts)


MODULES = {name_of(path): path for path in CORE}


def core_modules(path: Path) -> set[str]:
    """Names of the modules of electra_core that a file imports."""
    names = {name.removeprefix("electra_core.") for name in imports(path) if name.startswith("electra_core.")}
    return {part for name in names for part in (name, name.rpartition(".")[0]) if part in MODULES}


def room(module: str) -> str:
    """The folder of a module; "" for those that lie in electra_core itself."""
    return module.rpartition(".")[0]


def test_nothing_else_lies_at_the_top() -> None:
    """Whoever opens the repository sees what it is made of."""
    if shutil.which("git") is None:
        pytest.skip("git is not on the path")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a clone")
    assert {name.split("/")[0] for name in listed.stdout.split() if not name.startswith(".")} == {
        "setup.py", "electra_core", "kernels", "tests", "benchmarks", "docs", "README.md", "Makefile",
        "pyproject.toml", "constraints.txt",
    }  # fmt: skip


# Arrows -------------------------------------------------------------------------------------------------------


def test_kernels_know_nothing_of_electra() -> None:
    knowing = [path.name for path in KERNELS for name in imports(path) if name.split(".")[0] == "electra_core"]
    assert not knowing


@pytest.mark.parametrize("name", MODEL)
def test_the_model_does_not_know_who_trains_or_stores_it(name: str) -> None:
    """Through any number of imports."""
    reached, todo = set(), {name}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= core_modules(MODULES[module]) - reached
    above = {module for module in reached if module in ABOVE_THE_MODEL or room(module) in ROOMS_ABOVE_THE_MODEL}
    assert not above, f"{name} reaches {sorted(above)}"


@pytest.mark.parametrize("name", MODEL)
def test_the_model_does_no_reading_or_writing(name: str) -> None:
    path = ROOT / "electra_core" / f"{name}.py"
    tops = {module.split(".")[0] for module in imports(path)}
    assert not tops & {"os", "pathlib", "json", "io", "shutil", "safetensors", "pickle", "logging", "sys"}
    called = {node.func.id for node in ast.walk(parse(path))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    assert not called & {"open", "print", "input"}


def test_imports_go_one_way() -> None:
    """No files import each other, nor several in a circle, not even inside of functions."""
    graphlib.TopologicalSorter({name: core_modules(path) for name, path in MODULES.items()}).prepare()


def rooms_from_the_top_down() -> list[str]:
    """The folders in the order of the table in docs/index.md."""
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \[`(\w+)`\]\(\.\./electra_core/\1/__init__\.py\) \|", page, re.MULTILINE)


def test_rooms_import_each_other_one_way() -> None:
    """Whoever reads a folder needs only those below it, and what lies in electra_core itself."""
    order = rooms_from_the_top_down()
    assert sorted(order) == [folder.name for folder in ROOMS]
    arrows: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if room(name):
            arrows.setdefault(room(name), set()).update(
                {room(other) for other in core_modules(path)} - {"", room(name)}
            )
    for place, name in enumerate(order):
        assert arrows[name] <= set(order[place + 1 :]), f"{name} imports a folder that stands above it"
    assert not arrows["files"], "files are read and written without knowing what is in them"


@pytest.mark.parametrize("folder", [ROOT / "electra_core", *ROOMS], ids=lambda folder: folder.name)
def test_a_room_s_docstring_lists_its_modules(folder: Path) -> None:
    table = ast.get_docstring(parse(folder / "__init__.py")) or ""
    listed = re.findall(r"^(\w+)  +\S", table, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))


def test_the_loop_gets_a_loss_function_and_never_sees_the_model() -> None:
    known = core_modules(ROOT / "electra_core" / "training.py")
    assert known <= {"optim", "errors", "execution.distributed"}, known


def test_nothing_is_unpickled() -> None:
    for path in (*CORE, *KERNELS):
        known = imports(path)
        assert not {name.split(".")[0] for name in known} & {"pickle", "cPickle", "dill", "joblib"}, path
        assert "torch.load" not in known, f"{path}: torch.load is to be seen where it is called"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"


def test_no_file_of_tests_is_imported_by_another() -> None:
    """What several share is a helper's, with a name that says what it is."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("test_")], path


def test_only_the_command_line_prints_to_the_terminal_s_exit() -> None:
    """sys.exit is for the entry points; everywhere else errors are raised."""
    for path in CORE:
        calls = {ast.unparse(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
        if "sys.exit" in calls:
            assert name_of(path) in ("cli", "__main__"), path


# Types and docstrings -----------------------------------------------------------------------------------------


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """(name, definition, is a method) of the public functions of a module and of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, False
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                    yield f"{node.name}.{item.name}", item, True


def is_triton(function: ast.FunctionDef) -> bool:
    """Kernels and their helpers: parameters are pointers and blocks, which have no Python types."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def untyped(name: str, function: ast.FunctionDef, is_method: bool) -> list[str]:
    """What of a function has no type."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    if is_method and not any("staticmethod" in ast.unparse(d) for d in function.decorator_list):
        arguments = arguments[1:]
    bare = [f"{name}({argument.arg})" for argument in arguments if argument.annotation is None]
    return bare if function.returns is not None else [*bare, f"{name} ->"]


def test_modules_have_docstrings() -> None:
    trees = {path: parse(path) for path in (*CORE, *KERNELS)}
    bare = [str(path.relative_to(ROOT)) for path, tree in trees.items()
            if path.stat().st_size and not ast.get_docstring(tree)]  # fmt: skip
    assert bare == []


def test_public_functions_have_types() -> None:
    bare = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in (*CORE, *KERNELS)
        for name, function, is_method in public_functions(parse(path))
        if not is_triton(function)
        for what in untyped(name, function, is_method)
    ]
    assert bare == []


def test_public_functions_have_docstrings() -> None:
    """Of modules; a method whose class's docstring, base class or name says it all may do without."""
    bare = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in (*CORE, *KERNELS)
        for name, function, is_method in public_functions(parse(path))
        if not is_method and not is_triton(function) and not ast.get_docstring(function)
    ]
    assert bare == []


# The wheel ----------------------------------------------------------------------------------------------------


STALE = {"electra_core/squad.py", "electra_core/gone/__init__.py", "electra_kernels/gone.py"}
"""What an earlier `pip install .` has left in build/lib."""


@pytest.fixture(scope="module")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without the network from a copy of what is packaged."""
    # `importlib.util.find_spec("pip")` would make setuptools take back the distutils that it had put in place.
    if not all(map(importlib.machinery.PathFinder.find_spec, ("setuptools", "pip"))):
        pytest.skip("setuptools and pip are not in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("electra_core", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    for name in STALE:
        (source / "build" / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "build" / "lib" / name).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q",
               "--disable-pip-version-check", "-w", str(folder), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, f"which pip shows whoever installs: {done.stderr[:2000]}"
    (path,) = folder.glob("electra_core-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(built_wheel: Path) -> set[str]:
    """Names of the files in it."""
    with zipfile.ZipFile(built_wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_both_packages_with_all_their_modules(wheel: set[str]) -> None:
    assert {path.relative_to(ROOT).as_posix() for path in CORE} <= wheel
    assert {f"electra_kernels/{path.name}" for path in KERNELS} <= wheel
    tops = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"electra_core", "electra_kernels"}, "and no package named kernels or tests"


def test_what_a_wheel_installs_is_known_as_this_checkout(built_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(tmp_path)
    installed = source_digest([tmp_path / "electra_core", tmp_path / "electra_kernels"])
    assert installed == source_digest([ROOT / "electra_core", ROOT / "kernels"])


def test_the_wheel_holds_no_module_that_an_earlier_build_left(wheel: set[str]) -> None:
    assert not STALE & wheel


def test_the_wheel_holds_assets_and_the_shipped_model(wheel: set[str]) -> None:
    package = ROOT / "electra_core"
    files = [path for part in ("assets", "tiny") for path in (package / part).rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert any(path.suffix == ".css" for path in files)
    assert {f"electra_core/{path.relative_to(package).as_posix()}" for path in files} <= wheel


def test_the_archive_of_the_sources_is_a_whole_clone(tmp_path: Path) -> None:
    """Tests without their helpers, as setuptools takes them by itself, cannot run."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not in this environment")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "tiny", "site", "build", "dist")
    shutil.copytree(ROOT, source, ignore=ignore)
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        path for part in ("tests", "docs", "benchmarks") for path in (source / part).rglob("*") if path.is_file()
    ]
    assert {path.relative_to(source).as_posix() for path in wanted} | {"Makefile", "constraints.txt"} <= names


def test_the_wheel_says_that_it_has_types(wheel: set[str]) -> None:
    assert {"electra_core/py.typed", "electra_kernels/py.typed"} <= wheel


def test_the_readme_counts_the_compiled_kernels() -> None:
    """Tempered forms are the same kernel with another constant."""
    table = (ROOT / "benchmarks/results/compile/triton3.9.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    names = {row[1].strip(" `").removesuffix("_tempered") for row in rows}
    cases = sum(int(row[3]) for row in rows)
    spilled = {row[9].strip() for row in rows}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"{len(names)} kernels [compiled]" in readme and f"{cases} cases, without a spill on Triton 3.9" in readme
    )
    assert spilled == {"0"}
    for version in ("3.6", "3.7", "3.8"):  # "one each with 3.6 to 3.8"
        table = (ROOT / f"benchmarks/results/compile/triton{version}.md").read_text(encoding="utf-8")
        assert f"{cases} cases compiled, 1 problems." in table


def test_set_up_leaves_torch_and_triton_to_each_other() -> None:
    """A CUDA build of torch needs one triton and no other; a constraint on either would end the set-up there."""
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"^(torch|triton)\b", pinned, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^TORCH \?= torch==", makefile, re.MULTILINE)
    assert re.search(r"^TRITON \?= triton==", makefile, re.MULTILINE)
    for line in pinned.splitlines()[1:]:
        name, _, rest = line.partition("==")
        older = f"{name}=="
        assert "python_version" not in rest or pinned.count(f"\n{older}") == 2, f"{name}: for some Pythons only"
