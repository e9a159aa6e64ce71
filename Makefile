# Everything runs in .venv, whatever virtual environment is active; works with GNU make 3.81 and later.
#   make demo          fine-tune a real model and compare before and after
#   make demo-full     the same, trained longer
#   make test          the test suite
#   make check         format, lint, types, architecture
#   make conformance   PEFT's own tests on our methods
#   make faults        a failing disk and a kill at every call that saves or resumes a run (an hour)
#   make mutants       faults planted in the code: the tests must find each
#   make docs          docs/reference.md from the texts in the code
#   make clean         remove .venv and everything built

PYTHON ?= python3
# On Linux, plain pip brings a torch with CUDA. For a small one, name PyTorch's index of CPU builds: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 2

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt
# In a variable of its own: $(call) would take these commas for its own.
EVERYTHING := -e '.[train,eval,quant,dev]'
TORCH := $(shell grep '^torch==' constraints.txt)

unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX

.PHONY: help install demo demo-full test check conformance faults mutants docs clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(STAMP)

# torch alone and first: nothing that follows may then choose another one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	@test -x $(BIN)/pip || { echo "Making .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing $(TORCH)"
	@$(call quietly,$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH))
	@echo "Installing leantune and what it needs"
	@$(call quietly,$(PIP) $(EVERYTHING))
	@touch $(STAMP)

# The names of what is being downloaded; the whole log only when it fails.
define quietly
set -o pipefail; $(1) 2>&1 | tee .venv/install.log | sed -nE 's/^ *(Downloading|Using cached) ([^ ]+).*/  \2/p' \
	|| { tail -n 30 .venv/install.log; exit 1; }
endef

demo: $(STAMP)
	@$(BIN)/leantune demo $(ARGS)

demo-full: $(STAMP)
	@$(BIN)/leantune demo --full $(ARGS)

# One thread a process: two processes of two threads each would wait for each other.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: $(STAMP)
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/ruff check --output-format concise .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

# Fetches PEFT's source distribution at the installed version; nothing of it is kept in the repository.
conformance: $(STAMP)
	@$(BIN)/python tests/conformance/run.py $(ARGS)

faults: $(STAMP)
	@LEANTUNE_FAULTS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/train/test_fault.py $(ARGS)

mutants: $(STAMP)
	@$(BIN)/python tests/mutants/run.py $(ARGS)

docs: $(STAMP)
	@$(BIN)/python docs/reference.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/leantune.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
