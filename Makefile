# Everything runs in a virtual environment of its own, which these targets make and keep up to date.
# Nothing has to be installed first but Python >= 3.10, a C++ compiler and make.
#
#   PYTHON=python3.12                another Python
#   VENV=.venv                       another place for the environment
#   TORCH=torch==2.13.0              another torch; one that the environment already has is kept
#   SYSTEM_SITE_PACKAGES=1           let the environment see the packages of PYTHON, its torch too
#   CAME8BIT_REQUIRE_KERNELS=0       go on without the compiled kernels where they cannot be built

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SYSTEM_SITE_PACKAGES ?=
CAME8BIT_REQUIRE_KERNELS ?= 1
export CAME8BIT_REQUIRE_KERNELS

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMPS := $(VENV)/stamps
# Without the constraint an extra could replace the installed torch, a CPU build by a CUDA one for instance.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt

KERNEL_SOURCES := pyproject.toml build_tools/build_backend.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/shim -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES := came8bit tests examples benchmarks build_tools tools csrc/cmake

# For a GPU machine: folder of the report, wheels of other optimizers to carry there, and for which Python.
OUT ?= gpu-report
WHEELS ?= wheels
WHEELS_PYTHON ?= 3.12

# Arguments for the runs: make test ARGS="-k quant", make demo ARGS="--seeds 3"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help docs demo test lint type format bench-cpu bench-gpu bench-quant data build-checks cuda-compile
.PHONY: bench-memory-cap bench-step-in-backward bench-planner bench-paging gpu-report gpu-wheels wheel install tools clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          set up, build, train with every optimizer, write results/demo (3 to 6 minutes)"
	@echo "make test          set up, build, run the tests"
	@echo "make lint          ruff and clang-format, changing nothing"
	@echo "make type          mypy on came8bit/"
	@echo "make format        let ruff and clang-format rewrite the files"
	@echo "make bench-cpu     time of a step against other optimizers"
	@echo "make bench-gpu     the same on a GPU, and bandwidth; needs one"
	@echo "make bench-memory-cap  a Llama under a hard cap on memory: 7B and 8B on a GPU, scaled down on a CPU"
	@echo "make bench-quant   error and speed of the 8-bit codes"
	@echo "make bench-step-in-backward, bench-planner   memory of a training step, and of activations"
	@echo "make bench-paging  what paged state costs on a CPU"
	@echo "make data          fetch the text and image corpora into data/ (Debian and Ubuntu)"
	@echo "make docs          the documentation as a site, in build/docs"
	@echo "make build-checks  every way to install the package; the symbols of the library"
	@echo "make cuda-compile  every CUDA kernel for every architecture; spills and registers; needs nvcc, no GPU"
	@echo "make gpu-report    on a GPU machine, with its own Python: build, tests, sanitizer, benchmarks into OUT"
	@echo "make gpu-wheels    download the optimizers that the report compares with into WHEELS"
	@echo "make wheel         one wheel with both libraries, for every architecture, into dist"
	@echo "make install       set up and build only;  make tools: and ruff, mypy, clang-format, pre-commit"
	@echo "make clean         remove the environment, builds and caches"

demo: $(STAMPS)/demo
	$(BIN)/came8bit tradeoff --preset quick --out results/demo $(ARGS)

test: $(STAMPS)/test
	$(PY) -m pytest $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

type: $(STAMPS)/dev $(STAMPS)/demo
	$(BIN)/mypy

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix-only $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

bench-cpu: $(STAMPS)/demo
	$(PY) -m benchmarks.cpu_step $(ARGS)

bench-gpu: $(STAMPS)/demo
	$(PY) -m benchmarks.gpu_step $(ARGS)

bench-memory-cap: $(STAMPS)/test
	$(PY) -m benchmarks.memory_cap $(ARGS)

bench-quant: $(STAMPS)/demo
	$(PY) -m benchmarks.quant $(ARGS)

bench-step-in-backward: $(STAMPS)/test
	$(PY) -m benchmarks.step_in_backward $(ARGS)

bench-planner: $(STAMPS)/test
	$(PY) -m benchmarks.planner $(ARGS)

bench-paging: $(STAMPS)/demo
	$(PY) -m benchmarks.paging $(ARGS)

data:
	$(PYTHON) tools/fetch_data.py $(ARGS)

build-checks: $(STAMPS)/installed
	$(PY) build_tools/check_symbols.py
	$(PY) build_tools/check_install.py $(ARGS)

# ptxas speaks only when it compiles: the folder is a new one each time.
cuda-compile: $(STAMPS)/installed
	rm -rf build/cuda
	$(PY) build_tools/check_registers.py --build-dir build/cuda $(ARGS)
	$(PY) build_tools/check_symbols.py --cuda build/cuda

# No environment of ours: torch and all else are those of PYTHON, and nothing is downloaded.
gpu-report:
	$(PYTHON) tools/gpu_report.py --out "$(OUT)" --wheels "$(WHEELS)" $(ARGS)

gpu-wheels:
	$(PYTHON) tools/fetch_gpu_wheels.py --out "$(WHEELS)" --python $(WHEELS_PYTHON) $(ARGS)

wheel: $(STAMPS)/installed
	$(PIP) wheel
	$(PY) build_tools/build_wheel.py $(ARGS)

install: $(STAMPS)/installed
tools: $(STAMPS)/dev

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find came8bit tests benchmarks build_tools tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "came8bit needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_SITE_PACKAGES),--system-site-packages) $(VENV)

$(VENV)/constraints.txt: | $(PY)
	@$(PY) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || { \
	  echo "installing $(TORCH)"; $(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"; }
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@
	@cat $@

# Editable, so that the Python files in use are the ones in this folder; made anew when the C++ changes.
$(STAMPS)/installed: $(KERNEL_SOURCES) $(VENV)/constraints.txt
	@mkdir -p $(STAMPS)
	@echo "building and installing came8bit"
	$(PIP) --editable .
	@touch $@

# came8bit is installed by now: naming it with an extra only adds what the extra lists.
$(STAMPS)/demo: pyproject.toml | $(STAMPS)/installed
	@echo "installing what the demo needs"
	$(PIP) "came8bit[cli]"
	@$(PIP) "came8bit[baselines]" || echo "not all baselines could be installed: those will be reported as skipped"
	@touch $@

$(STAMPS)/test: pyproject.toml $(STAMPS)/demo | $(STAMPS)/installed
	$(PIP) "came8bit[test]"
	@touch $@

$(STAMPS)/docs: pyproject.toml | $(STAMPS)/installed
	$(PIP) "came8bit[docs]"
	@touch $@

$(STAMPS)/dev: pyproject.toml | $(STAMPS)/installed
	$(PIP) "came8bit[dev]"
	@touch $@
