# `make demo` and `make test` need Python 3.11 or later and make; everything else they install into .venv.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash
# Tests start a hundred processes that import the same files.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test quick tests quick-tests test-slurm test-slurm-slow test-browser slurm browser lint style \
	types clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# Once, and not in each of the many programs that tests start, where the environment keeps Python from writing it down.
	$(BIN)/python -m compileall -q rxt_dist data_prep launch
	touch $@

demo: install
	$(BIN)/python -m launch.demo

lint: style types

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# A process more than cores, as those that run ranks or kill programs also wait (tests/conftest.py).
SHARED := --dist=loadfile --no-loadscope-reorder

# mypy is one process of some twenty seconds: beside the tests no core waits for it.
test: install
	@$(MAKE) --no-print-directory --jobs=2 types tests

tests: style
	$(BIN)/python -m pytest --durations=25 --numprocesses=3 $(SHARED) -m "not slurm"

# What a change should pass before it is looked at: within two minutes on two cores.
quick: install
	@$(MAKE) --no-print-directory --jobs=2 types quick-tests

quick-tests: style
	$(BIN)/python -m pytest --numprocesses=2 $(SHARED) -m "not slow and not distributed and not faults and not slurm"

# On a real SLURM of four nodes within this machine, which the tests bring up and take down. It needs root, for network
# and process namespaces; where that or SLURM is missing, the tests say so and are skipped.
test-slurm: install slurm
	$(BIN)/python -m pytest -rs --durations=25 tests/slurm -m "not slow"

# What takes minutes to come about: a real time limit, a cut cable, chains of jobs.
test-slurm-slow: install slurm
	$(BIN)/python -m pytest -rs --durations=25 tests/slurm -m slow

# A report in Chromium; where that is missing and cannot be installed, the tests say so and are skipped.
test-browser: install browser
	$(BIN)/python -m pytest -rs tests/report/test_browser.py

slurm:
	@command -v slurmctld >/dev/null || tests/install.sh SLURM slurm-wlm munge iproute2

browser:
	@command -v chromium chromium-browser google-chrome google-chrome-stable chrome >/dev/null || \
		 tests/install.sh Chromium chromium

clean:
	rm -rf .venv .demo runs
