# `make test` and `make bench` need Python >= 3.11 and make; they set up .venv themselves.

PYTHON ?= python3
BENCH_ARGS ?=
JOBS ?= 2
PYTEST_ARGS ?=
EXTRAS := jax,torch,bench,dev

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests and the benchmark start many processes, each of which would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup test bench format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 picks the interpreter of .venv, JOBS=4 the number of test processes;'
	@echo '  BENCH_ARGS="..." and PYTEST_ARGS="..." add arguments.'

setup: $(STAMP) ## Make .venv with the pinned versions (test and bench do it when needed)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || \
	  { echo "error: no $(PYTHON) here; install Python 3.11 or newer, or say which one: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1); Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	@echo "[setup] making $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv $(VENV)
	@echo "[setup] installing .[$(EXTRAS)] at the versions of constraints.txt (once; takes some minutes)"
	@# --no-compile: most of what is installed is never imported; what is, Python compiles then
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
	@echo "[setup] done"

test: $(STAMP) ## Run every check: lint, format, types, import contracts, tests
	@echo "[test] ruff check: lint"
	@$(BIN)/ruff check .
	@echo "[test] ruff format: layout"
	@$(BIN)/ruff format --check .
	@echo "[test] mypy: types"
	@$(BIN)/mypy
	@echo "[test] lint-imports: which package may import which"
	@$(BIN)/lint-imports
	@echo "[test] pytest: both backends against the oracle and each other"
	@$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

bench: $(STAMP) ## Measure scaling curves of all mechanisms in both backends
	@echo "[bench] python -m bench scaling $(BENCH_ARGS)"
	@$(BIN)/python -m bench scaling $(BENCH_ARGS)

format: $(STAMP) ## Rewrite the layout and the imports of all files
	@$(BIN)/ruff check --fix --select I .
	@$(BIN)/ruff format .

clean: ## Remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
