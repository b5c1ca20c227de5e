# The commands of this project. Everything is installed into $(VENV); nothing outside it is touched.
#   make demo    the main job on real data, from a fresh clone
#   make test    lint, format, types and tests
#   make sweep   the long runs over many models
#   make bench   the benchmarks
#   make libraries  the tests that need transformers, diffusers, ultralytics and the like, with them
#   make oldest  the main job on the oldest torch that is allowed, in an environment of its own
#   make docs    the documentation as a site, in build/docs
# Variables: PYTHON (which interpreter makes the environment), VENV, PIP_ARGS (passed to pip install),
# PYTEST_ARGS (passed to pytest).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
OLDEST ?= .venv-oldest
OLDEST_TORCH := torch==2.6.0 torchvision==0.21.0

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)
CODE := allocator adapters recipes tests benchmarks docs/hooks

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types rooms unit sweep libraries bench oldest docs clean

help:
	@sed -n '2,10s/^# \{0,1\}//p' Makefile

$(PY):
	"$(PYTHON)" -m venv $(VENV)

# One stamp per extra: installed once, again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	@echo "installing neuron-allocator[$*] into $(VENV) (once; this can take some minutes)"
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(PY) -m allocator.recipes.demo

test: lint unit

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	@$(MAKE) --no-print-directory types rooms

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

# adapters/ and recipes/ are installed inside the package; mypy sees them there through a tree of links.
types: $(VENV)/.installed-dev
	@rm -rf build/types && mkdir -p build/types/allocator
	@ln -s "$(CURDIR)"/allocator/* "$(CURDIR)/adapters" "$(CURDIR)/recipes" build/types/allocator/
	$(PY) -m mypy build/types/allocator tests

# What may look at what (import-linter, by the contract in pyproject.toml), on the tree that `types` laid out.
rooms: types
	@cd build/types && PYTHONPATH=. PYTHONWARNINGS=ignore "$(abspath $(PY))" -c \
		"from importlinter.cli import lint_imports_command; lint_imports_command()" \
		"$(CURDIR)/pyproject.toml" --no-logo > ../rooms.txt || { cat ../rooms.txt; exit 1; }

unit: $(VENV)/.installed-dev
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

sweep: $(VENV)/.installed-dev
	$(PY) -m pytest -m sweep -n $(WORKERS) --timeout 3600 $(PYTEST_ARGS)

WITH_LIBRARIES := $(addprefix tests/test_,yolo.py hugging_face.py folders.py hub.py widening_norms.py build.py growing.py)

libraries: $(foreach extra,dev language ultralytics hub,$(VENV)/.installed-$(extra))
	$(PY) -m pytest -n $(WORKERS) $(WITH_LIBRARIES) $(PYTEST_ARGS)

bench: $(VENV)/.installed-bench
	$(PY) -m benchmarks.run

$(OLDEST)/.installed: pyproject.toml
	"$(PYTHON)" -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) $(OLDEST_TORCH) -e '.[dev]'
	@touch $@

oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m benchmarks.oldest_torch -n $(WORKERS) $(PYTEST_ARGS)

docs: $(VENV)/.installed-docs
	$(PY) -m mkdocs build --strict

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
