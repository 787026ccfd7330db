# Needs Python 3.11 or later. Another one: make test PYTHON=python3.13

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= .venv/$(VERSION)
# What `make test` installs; CI adds tpu.
EXTRAS ?= dev
# Goes to the main job, or to pytest: make test ARGS="-k kl".
ARGS ?=

RUN := $(VENV)/bin/python -m
DEV := $(VENV)/.installed-$(EXTRAS)

help:  ## This list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

quickstart: $(VENV)/.installed-experiments  ## Install, and distil the handwritten digits
	$(RUN) experiments.digits $(ARGS)

test: $(DEV)  ## Install, and run the whole suite with the doctests
	$(RUN) pytest -n 2 --dist worksteal $(ARGS)

slow: $(DEV)  ## Run the long tests, and more parameters of others
	$(RUN) pytest -m slow -n 2 --dist worksteal $(ARGS)

lint: $(DEV)  ## Check style and format
	$(RUN) ruff check
	$(RUN) ruff format --check

typecheck: $(DEV)  ## Check types
	$(RUN) mypy

format: $(DEV)  ## Format, and repair what ruff can
	$(RUN) ruff check --fix
	$(RUN) ruff format

# One virtual environment per Python; a stamp per set of extras, older than
# pyproject.toml when the dependencies may have changed.
$(VENV)/.installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'kdjax needs Python 3.11 or later, and $(PYTHON) is not one.' \
	    'Name one: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) cannot make virtual environments.' \
	    'On Debian and Ubuntu: apt install python$(VERSION)-venv' >&2; exit 1; }
	@echo 'Installing kdjax[$*] into $(VENV); the first time takes some minutes.'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

.PHONY: help quickstart test slow lint typecheck format
