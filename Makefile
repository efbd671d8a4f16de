# Every package is independent; this file runs the same step in each. `make help` lists the commands.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BASICS := assignment1-basics
SYSTEMS := assignment2-systems
PACKAGES := $(BASICS) $(SYSTEMS)
# Packages of this repository that another one imports.
NEEDS_$(SYSTEMS) := ../$(BASICS)

# uv: the one on the PATH, or one of our own, which pip puts into .tools/.
UV_VERSION := 0.13.9
PYTHON ?= python3
UV_FOUND := $(shell command -v uv 2>/dev/null)
UV_NEEDED := $(if $(UV_FOUND),,.tools/bin/uv)
UV := "$(or $(UV_FOUND),$(CURDIR)/.tools/bin/uv)"
RUN := $(UV) run --no-sync
# Each step works in the environment of its package, not in one that happens to be active.
unexport VIRTUAL_ENV CONDA_PREFIX

.PHONY: help setup demo test lint format course-tests data-tinystories data-owt lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(PACKAGES:%=%/.venv/.synced) ## create every package's environment from its lock file

demo: $(BASICS)/.venv/.synced ## train a tokenizer and a language model in minutes, then sample (DATA=path.txt: on your text)
	@cd $(BASICS) && $(RUN) cs336-basics demo $(if $(DATA),--data "$(if $(filter /% ~%,$(firstword $(DATA))),,$(CURDIR)/)$(DATA)")

test: setup ## run the CPU tests of every package
	@$(BASICS)/.venv/bin/python -m pytest -q tools/tests
	@for package in $(PACKAGES); do (cd $$package && $(RUN) pytest -q) || exit 1; done

lint: setup .venv/.synced ## check style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy --config-file pyproject.toml tools/course_tests.py
	@for package in $(PACKAGES); do \
	  (cd $$package && ../.venv/bin/mypy --config-file ../pyproject.toml --python-executable .venv/bin/python \
	    $$(ls -d cs336_* benchmarks experiments 2>/dev/null)) || exit 1; done

format: .venv/.synced ## format the code, mend what can be mended
	@.venv/bin/ruff check --quiet --fix . || true
	@.venv/bin/ruff format .

course-tests: setup ## run the course's own tests: COURSE=path of a checkout of one of its assignments
	@$(BASICS)/.venv/bin/python tools/course_tests.py "$(COURSE)" $(ARGS)

data-tinystories: $(BASICS)/.venv/.synced ## download TinyStories (2.2 GB) into assignment1-basics/data/tinystories
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download tinystories

data-owt: $(BASICS)/.venv/.synced ## download the course's OpenWebText sample (12 GB) into assignment1-basics/data/owt
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download owt

lock: $(UV_NEEDED) ## resolve the dependencies anew and write the lock files
	@for folder in . $(PACKAGES); do (cd $$folder && rm -f uv.lock && $(UV) lock --quiet && \
	  $(UV) export --quiet --format requirements-txt --no-emit-local --all-groups -o requirements.lock && \
	  ! grep -nE 'https?://' requirements.lock) || exit 1; done

clean: ## remove the environments (data and runs stay)
	rm -rf .tools .venv $(PACKAGES:%=%/.venv)

%/.venv/.synced: %/requirements.lock %/pyproject.toml | $(UV_NEEDED)
	@cd $* && $(UV) venv --quiet --allow-existing && $(UV) pip sync --quiet --require-hashes requirements.lock && \
	  $(UV) pip install --quiet --no-deps $(patsubst %,--editable %,. $(NEEDS_$*)) && touch .venv/.synced

.venv/.synced: requirements.lock | $(UV_NEEDED)
	@$(UV) venv --quiet --allow-existing && $(UV) pip sync --quiet --require-hashes requirements.lock && touch $@

.tools/bin/uv:
	@echo "uv is not installed: getting uv $(UV_VERSION) with pip into .tools/"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv==$(UV_VERSION)
