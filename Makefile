# Everything a newcomer needs: `make demo` trains a small model, `make test` checks the project.
# Both make .venv and install into it what they need; nothing else on the machine is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml README.md $(shell find layers arch lit_modules recipes -name '*.py' -o -name '*.yaml' -o -name '*.json')
PYTEST := $(BIN)/python -m pytest
# The folders here are the package's sources; the tests run against the installed package.
export PYTHONSAFEPATH := 1

.NOTPARALLEL:
.PHONY: demo test test-all test-gpu lint types develop benchmark clean

demo: $(VENV)/.installed
	$(BIN)/memzoo fit --config titans/mac_tiny.yaml

test: lint types
	$(PYTEST) -n auto -m "not slow and not gpu"

test-all: lint types
	$(PYTEST) -n auto -m "not gpu"

test-gpu: $(VENV)/.installed-dev
	$(PYTEST) -m gpu

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy -p memzoo.layers -p memzoo.arch -p memzoo.lit_modules

# An install that follows edits of existing files, for development; after adding a file, run it again.
develop: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --no-deps -e . --config-settings editable_mode=strict

benchmark: $(VENV)/.installed-dev
	PYTHONSAFEPATH= $(BIN)/python scripts/benchmark.py

clean:
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; install a newer one and run: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }

# Dependencies once a pyproject.toml, the package itself whenever a source is newer. build/ may hold files that were
# removed since, and setuptools would put them into the wheel.
$(VENV)/.dependencies: pyproject.toml | $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --quiet .
	touch $@

$(VENV)/.dependencies-dev: pyproject.toml | $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --quiet '.[dev]'
	touch $@ $(VENV)/.dependencies

$(VENV)/.installed: $(SOURCES) $(VENV)/.dependencies
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.dependencies-dev $(VENV)/.installed
	touch $@
