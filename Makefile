# `make demo` and `make test` need nothing but Python: each makes .venv and installs what it needs, once.

PYTHON ?= python3
BIN := .venv/bin
# Stamps: their timestamps say when pyproject.toml and constraints.txt were last installed from.
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev
PEERS := .venv-peers/.installed
TRAINERS := .venv-trainers/.installed
INSTALL := install --disable-pip-version-check -q -c constraints.txt
PIP_INSTALL := $(BIN)/pip $(INSTALL)

.DEFAULT_GOAL := help
.PHONY: help demo test trainers lint types layers benchmark install clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo "Arguments: make demo ARGS='--steps 50', make test ARGS='-k sinks'. Another Python: make PYTHON=python3.12"

demo: $(DEMO)  ## Run the demonstration
	$(BIN)/gradmon demo $(ARGS)

test: $(DEV)  ## Run the tests
	$(BIN)/pytest $(ARGS)

trainers: $(TRAINERS)  ## Run the tests of the callbacks, with every trainer
	.venv-trainers/bin/pytest tests/trainers $(ARGS)

lint: $(DEV)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## Check types
	$(BIN)/pyright

layers: $(DEV)  ## Check who imports whom
	$(BIN)/lint-imports

benchmark: $(PEERS)  ## Run the benchmarks, and write docs/benchmarks.md
	.venv-peers/bin/python benchmarks/overhead.py --write $(ARGS)
	.venv-peers/bin/python benchmarks/per_example.py --write $(ARGS)
	.venv-peers/bin/python benchmarks/tightness.py --write
	.venv-peers/bin/python benchmarks/masks.py --write $(ARGS)
	.venv-peers/bin/python benchmarks/sinks.py --write

install: $(DEV)  ## Install everything into .venv, editable

clean:  ## Remove .venv and whatever else was made
	rm -rf .venv .venv-wheel .venv-peers .venv-trainers build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find gradmon integrations tests -name __pycache__ -type d -prune -exec rm -rf {} +

# bin/pip comes last when a virtual environment is made, so it tells a whole one from a broken one.
$(BIN)/pip .venv-peers/bin/pip .venv-trainers/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "gradmon needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name another one, as in: make $(MAKECMDGOALS) PYTHON=/usr/bin/python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(@:/bin/pip=)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(DEMO)

# Apart from .venv: the tests run without a peer, and a peer may want versions that gradmon does not.
# [demo] brings the digits.
$(PEERS): pyproject.toml constraints.txt | .venv-peers/bin/pip
	.venv-peers/bin/pip $(INSTALL) -e '.[demo,figures,peers]'
	@touch $@

# Apart from .venv, because they are large.
$(TRAINERS): pyproject.toml constraints.txt | .venv-trainers/bin/pip
	.venv-trainers/bin/pip $(INSTALL) -e '.[trainers]'
	@touch $@
