# `make demo` and `make test` need Python 3.11 or later and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: install demo test quick quick-tests lint clean

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

# What a change should pass before it is looked at: within two minutes on two cores.
quick: install
	$(MAKE) --jobs=2 --output-sync=target lint quick-tests

quick-tests: install
	$(BIN)/python -m pytest -m "not slow and not distributed and not faults"

clean:
	rm -rf .venv .demo runs
