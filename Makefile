# `make demo` and `make test` need Python 3.11 or later and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: install demo test quick quick-data quick-training lint clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/python -m launch.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --durations=25

# What a change should pass before it is looked at: within two minutes on two cores, both of which it uses.
quick: install
	$(MAKE) --jobs=2 --keep-going --output-sync=target quick-data quick-training lint

QUICK := -m "not slow and not distributed and not faults"
DATA_TESTS := tests/data_prep

quick-data: install
	$(BIN)/python -m pytest $(QUICK) $(DATA_TESTS)

quick-training: install
	$(BIN)/python -m pytest $(QUICK) --ignore=$(DATA_TESTS)

clean:
	rm -rf .venv .demo runs
