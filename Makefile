# make train | test | test-all | lint | setup | clean.   PYTHON=/path/to/python chooses the interpreter;
# every minor version has its own environment under .venv/.
PYTHON ?= $(shell sh scripts/find_python.sh)
VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv/$(VERSION)
RUN := $(VENV)/bin/python
CONFIG ?= configs/tiny.yaml
TESTS ?= tests

.PHONY: train test test-all lint setup clean
.DEFAULT_GOAL := setup

$(VENV)/.installed: setup.cfg pyproject.toml
	@test -n "$(VERSION)" || { echo "PYTHON=$(PYTHON) does not run" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

setup: $(VENV)/.installed

train: setup
	$(RUN) -m train $(CONFIG)

test: setup
	$(RUN) -m pytest $(TESTS) -n 2 --dist worksteal -m "not slow and not gpu"

test-all: setup
	$(RUN) -m pytest $(TESTS) -n 2 --dist worksteal -m "not gpu"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
