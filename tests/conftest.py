"""What all tests share: the interpreter where no GPU is, the `gpu` marker, the data folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

with contextlib.suppress(ImportError):  # before anything imports Python 3.10's own distutils, which it replaces
    import setuptools  # noqa: F401

import pytest
import torch

# 80, 90 or 100: kernels are compiled for it, and their PTX runs on the CPU (`ptx_machine.py`).
PTX = int(os.environ.get("ELECTRA_PTX", "0"))
# Triton reads this when it is imported, so it has to be set before any test module is.
if PTX:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS in deterministic mode asks for it
SCORING_TAGS = "pip install 'electra-core[tag]'"
"""What is said where seqeval is missing."""
torch.set_float32_matmul_precision("highest")  # which NVIDIA's containers lower for all programs
with contextlib.suppress(ImportError):  # a GPU's machine may do without
    from hypothesis import settings

    settings.register_profile("electra", derandomize=True, deadline=None)  # a change alone may fail a test
    settings.register_profile("search", deadline=None)  # `--hypothesis-profile=search`: other examples every time
    settings.load_profile("electra")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each take all cores only wait for one another
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests, visibly, where there is no GPU."""
    if torch.cuda.is_available() and not PTX:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[object]:
    """Skips tests that score tags, visibly, where seqeval is not installed."""
    from electra_core.errors import UserError

    try:
        return (yield)
    except UserError as error:
        if SCORING_TAGS in str(error) and importlib.util.find_spec("seqeval") is None:
            pytest.skip(str(error))
        raise


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """With ELECTRA_ELSEWHERE: kernel tests on a device that does not mix with the host's."""
    if "ELECTRA_ELSEWHERE" not in os.environ:
        yield
        return
    from elsewhere import elsewhere

    if "host_only" in item.keywords:
        pytest.skip("not on the pretended device")
    # Autocast does not know it.
    autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with elsewhere(), autocast:
        yield


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """On a GPU workers share its memory: what PyTorch keeps for later is lost to the others."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=bool(PTX))
def _ptx_gpu() -> Iterator[None]:
    """With ELECTRA_PTX: every kernel of the session runs as PTX."""
    from ptx_driver import LAUNCHED, ptx_gpu

    with ptx_gpu(PTX):
        yield
    print(f"\nran as PTX for sm_{PTX}, launches: {LAUNCHED}")


@pytest.fixture
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that pretend to be fast at bf16 do without oneDNN's operator where it does not multiply in bf16."""
    if not getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)():
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public datasets: ELECTRA_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("ELECTRA_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set ELECTRA_DATA)")
    return folder
