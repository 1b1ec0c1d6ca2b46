# Each target does the set-up it needs: a fresh clone and Python >= 3.10 are enough.
#   make demo     the whole story, in minutes           make test     the test suite
#   make check    lint, format, types                   make test-ptx: the compiled kernels, without a GPU
#                                                       make test-gpu, bench-kernels, tune: with an NVIDIA GPU
# `make test-gpu VENV=`, and so with the other targets for a GPU: no set-up, the python3 at hand (PYTHON) as it is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(if $(VENV),$(VENV)/.ready)
PY := $(if $(VENV),$(BIN)/python,$(PYTHON))
DEMO_OUT ?= demo
OUT ?= build/gpu
TEST_JOBS ?= auto
# Most of a kernel's test on a GPU is its compilation, which is the host's work.
# A GPU in exclusive mode takes one process. Tests of tensors of gigabytes are one group, so never run beside each other.
GPU_JOBS ?= $(shell nvidia-smi --query-gpu=compute_mode --format=csv,noheader 2>/dev/null | grep -qi exclusive && echo 1 || echo 8)
GPU_PYTEST = $(PY) -m pytest $$($(PY) -c "import xdist" 2>/dev/null && echo "--dist loadgroup -n $(GPU_JOBS)")
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,rng attention attention_contract mlm_head sample_replace rtd_loss layer_norm \
	bias_gelu embedding_layer_norm every_kernel compile_report))
GPU_TESTS := tests/test_attention_gpu.py
NEEDS_GPU := $(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'this target needs a CUDA device')"
NEEDS_GPU += && $(PY) -c "import sys, torch; from electra_kernels.dispatch import gpu_problem; sys.exit(gpu_problem(torch.device('cuda'), torch.bfloat16) and 1)"

.PHONY: docs setup demo test check test-gpu test-elsewhere sanitize test-triton-oldest test-ptx compile-report bench-gpu bench-kernels tune clean

setup: $(READY)

# Where there is none; a torch that is there already (CPU or CUDA) is kept. A CUDA build brings the triton that it needs, and no
# other; a CPU build brings none. So neither stands in constraints.txt.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0; platform_system == 'Linux'
$(or $(READY),.venv/.ready): setup.py pyproject.toml constraints.txt
	@test -d $(VENV) || { echo "setting up $(VENV) (once, a few minutes)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "$(TRITON)"
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

# On a GPU the kernel tests run for real, in three precisions; of the other files, what is marked `gpu`.
# A part that fails does not keep the others from running: a GPU may not be there a second time.
test-gpu: $(READY)
	@$(NEEDS_GPU)
	@status=0; \
	$(GPU_PYTEST) $(KERNEL_TESTS) $(GPU_TESTS) || status=1; \
	$(GPU_PYTEST) -m gpu $(addprefix --ignore=,$(KERNEL_TESTS) $(GPU_TESTS)) || status=1; \
	$(MAKE) --no-print-directory sanitize || status=1; \
	exit $$status

# The kernel tests with tensors that do not mix with the host's, without a GPU (minutes): what a test forgets to move.
test-elsewhere: $(READY)
	@ELECTRA_ELSEWHERE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) $(filter-out %compile_report.py,$(KERNEL_TESTS))

# Without PyTorch's caching allocator every tensor is an allocation, whose ends memcheck then knows.
sanitize: $(READY)
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer (CUDA toolkit) is not on the path: skipped"; exit 0; } && \
	status=0; for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) tests/kernel_calls.py || status=1; \
	done; exit $$status

# The oldest Triton that is supported lies in a folder that comes first on the path; everything else is the
# environment that `make test` uses.
OLDEST := $(VENV)-oldest
OLDEST_PACKAGES := triton==3.6.0
# As compiled for sm_100, where it forgets a barrier that the kernel then sets (`attention_kernels.BARRIER_AFTER_SCORES`).
OLDEST_PTX_TESTS := tests/test_every_kernel.py -k attention-short

$(OLDEST)/.ready: $(READY)
	@rm -rf $(OLDEST)
	@$(BIN)/python -m pip install -q --no-deps --target $(OLDEST) $(OLDEST_PACKAGES)
	@touch $@

test-triton-oldest: $(OLDEST)/.ready
	@PYTHONPATH=$(OLDEST) $(BIN)/python -c "import triton; print('triton', triton.__version__)"
	@PYTHONPATH=$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) $(KERNEL_TESTS)
	@PYTHONPATH=$(OLDEST) ELECTRA_PTX=100 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(OLDEST_PTX_TESTS)

# The kernels as compiled for a GPU, run on the CPU one PTX instruction at a time, every access checked (minutes).
PTX := 80 90 100
PTX_TESTS := tests/test_ptx_kernels.py tests/test_cross_check.py $(filter-out %compile_report.py,$(KERNEL_TESTS))
test-ptx: $(READY)
	@for capability in $(PTX); do \
		echo "the kernels' PTX for sm_$$capability"; \
		ELECTRA_PTX=$$capability OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) $(PTX_TESTS) || exit 1; \
	done

compile-report: $(READY)
	@$(BIN)/python -m benchmarks.compile_report

# Results of these two: benchmarks/results/gpu/*.json, beside the tables they print.
tune: $(READY)
	@$(NEEDS_GPU)
	@$(PY) -m benchmarks.tune --compile-first --out benchmarks/results/gpu/tune.json

# Each kernel against its twin and the strongest peers; needs a CUDA device.
bench-kernels: $(READY)
	@$(NEEDS_GPU)
	@status=0; for name in attention mlm_head sample_replace rtd_loss layer_norm bias_gelu; do \
		$(PY) -m benchmarks.bench_$$name --out benchmarks/results/gpu/$$name.json || status=1; \
	done; exit $$status

# Everything that needs a GPU, in pieces below nine minutes, the most valuable first; again goes on where it stopped.
# CORPUS=DATA: a prepared corpus for the learning study (default: the docstrings on the machine).
# MINUTES=9: what a GPU is best used for in so many minutes, its tests included, into OUT.
bench-gpu: $(READY)
	@$(PY) -m benchmarks gpu $(if $(MINUTES),--minutes $(MINUTES) --out $(OUT),--device cuda $(if $(CORPUS),--corpus $(CORPUS)))

# The documentation as a site without network: site/index.html.
docs: $(READY)
	@$(BIN)/python -c "import latex2mathml, material, mkdocstrings, ziamath" 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml
	@echo "open site/index.html (its search needs a server: python -m http.server -d site)"

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
