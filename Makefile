# `make demo` and `make test` need nothing but Python: each makes .venv and installs what it needs, once.

PYTHON ?= python3
BIN := .venv/bin
# Stamps: their timestamps say when pyproject.toml and constraints.txt were last installed from.
DEMO := .venv/.installed-demo
DEV := .venv/.installed-dev
PEERS := .venv-peers/.installed
TRAINERS := .venv-trainers/.installed
OLDER := .venv-trainers-older/.installed
INSTALL := install --disable-pip-version-check -q -c constraints.txt
PIP_INSTALL := $(BIN)/pip $(INSTALL)
# One process a core, with one thread each: more of either get in each other's way. A file stays in one, with its servers.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test trainers trainers-older lint types layers benchmark install clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24
	@echo "Arguments: make demo ARGS='--steps 50', make test ARGS='-k sinks'. Another Python: make PYTHON=python3.12"

demo: $(DEMO)  ## Run the demonstration
	$(BIN)/gradmon demo $(ARGS)

test: $(DEV)  ## Run the tests
	$(PYTEST) $(ARGS)

trainers: $(TRAINERS)  ## Run the tests of the callbacks, with every trainer
	$(PYTEST:$(BIN)/%=.venv-trainers/bin/%) tests/trainers $(ARGS)

trainers-older: $(OLDER)  ## Run those of Lightning and transformers with the oldest versions that are supported
	$(PYTEST:$(BIN)/%=.venv-trainers-older/bin/%) tests/trainers/test_lightning*.py tests/trainers/test_transformers*.py $(ARGS)

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
	.venv-peers/bin/python benchmarks/distributed.py --write
	.venv-peers/bin/python benchmarks/average_gradient.py --write
	.venv-peers/bin/python benchmarks/guessers.py --write
	.venv-peers/bin/python -m benchmarks.foresight --write

install: $(DEV)  ## Install everything into .venv, editable

clean:  ## Remove .venv and whatever else was made
	rm -rf .venv .venv-wheel .venv-peers .venv-trainers .venv-trainers-older build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find gradmon integrations tests -name __pycache__ -type d -prune -exec rm -rf {} +

# bin/pip comes last when a virtual environment is made, so it tells a whole one from a broken one.
$(BIN)/pip .venv-peers/bin/pip .venv-trainers/bin/pip .venv-trainers-older/bin/pip:
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

# What constraints-older.txt pins comes before what constraints.txt pins.
$(OLDER): pyproject.toml constraints.txt constraints-older.txt | .venv-trainers-older/bin/pip
	awk -F== 'NR == FNR { older[$$1]; print; next } !($$1 in older)' constraints-older.txt constraints.txt > $(@:.installed=constraints.txt)
	.venv-trainers-older/bin/pip $(INSTALL:constraints.txt=$(@:.installed=constraints.txt)) -e '.[trainers]'
	@touch $@
