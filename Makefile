# Each target does the set-up it needs: a fresh clone and Python >= 3.10 are enough.
#   make demo     the whole story, in minutes           make test     the test suite
#   make check    lint, format, types                   make test-gpu, bench-kernels, tune: with an NVIDIA GPU
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_OUT ?= demo
TEST_JOBS ?= auto

.PHONY: setup demo test check test-gpu test-triton-oldest compile-report bench-kernels tune clean

setup: $(READY)

# torch first and alone: a torch that is there already (CPU or CUDA) is kept, and its own triton with it.
$(READY): setup.py pyproject.toml constraints.txt
	@test -d $(VENV) || { echo "setting up $(VENV) (once, a few minutes)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]' 2>$(VENV)/setup.log || { cat $(VENV)/setup.log; exit 1; }
	@touch $(READY)

demo: $(READY)
	@$(BIN)/electra demo --out $(DEMO_OUT)

test: $(READY)
	@$(BIN)/python -c "import torch; print('torch', torch.__version__, '| CUDA:', torch.cuda.get_device_name() if torch.cuda.is_available() else 'none, so gpu tests are skipped')"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn $(CURDIR)/kernels $(VENV)/types/electra_kernels  # its import name, for mypy
	@MYPYPATH=$(VENV)/types $(BIN)/mypy -p electra_core -p electra_kernels

test-gpu: $(READY)
	@$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'make test-gpu needs a CUDA device'"
	@$(BIN)/python -m pytest -m gpu

# The oldest Triton that is supported, in an environment of its own.
test-triton-oldest:
	@test -d $(VENV)-oldest || $(PYTHON) -m venv $(VENV)-oldest
	@$(VENV)-oldest/bin/python -m pip install -q -c constraints.txt torch
	@$(VENV)-oldest/bin/python -m pip install -q 'numpy==2.2.*' scipy hypothesis pytest pytest-xdist setuptools triton==3.6.0 # its interpreter breaks on newer numpy
	@$(VENV)-oldest/bin/python -m pip install -q --no-deps -e . 2>/dev/null
	@OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -q -n $(TEST_JOBS) tests/test_rng.py tests/test_attention.py \
		tests/test_mlm_head.py tests/test_sample_replace.py tests/test_rtd_loss.py tests/test_compile_report.py

compile-report: $(READY)
	@$(BIN)/python -m benchmarks.compile_report

tune: $(READY)
	@$(BIN)/python -m benchmarks.tune

# Each kernel against its twin and the strongest peers; needs a CUDA device.
bench-kernels: $(READY)
	@for name in attention mlm_head sample_replace rtd_loss layer_norm; do $(BIN)/python -m benchmarks.bench_$$name || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
