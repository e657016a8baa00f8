# Two commands on a fresh clone: `make demo` and `make test`. Both set up .venv first; the second time
# that is only a look at a stamp file. Choose the Python for .venv with `make PYTHON=/path/to/python3.11`.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The script runs under any python3 and looks for the Python 3.11 that it needs by itself.
RUNNER := $(shell command -v python3 || command -v python3.11 || command -v python || echo python3)
# -I and -S: start quickly, and untouched by PYTHONPATH or by what is installed.
SETUP = $(RUNNER) -IS tests/engines/setup_env.py $(if $(PYTHON),--python "$(PYTHON)")
PY := .venv/bin/python

.PHONY: help setup demo test lint types docs docs-outputs package clean-env matrix surroundings frameworks torture soak fuzz

help:
	@echo "make demo       run kvhook on a real vLLM engine (CPU) and show what it saw"
	@echo "make test       run all tests, those on the real engine among them"
	@echo "make lint       ruff: check and formatting"
	@echo "make types      mypy --strict"
	@echo "make docs       build the documentation into build/docs; warnings are errors"
	@echo "make docs-outputs  run the pages' code and put what it prints into README.md and docs/"
	@echo "make package    build the sdist and the wheel, check them, install them into an empty environment"
	@echo "make setup      only make .venv (2.5 GB: vLLM's CPU build, pinned); the others do it by themselves"
	@echo "make matrix     run the truth tests on 27 vLLM releases, 0.6.6 to 0.32.0; one: make matrix VLLM=0.9.2"
	@echo "make surroundings  the tests that need no engine, as background job, from cron, in other locales ..."
	@echo "make frameworks  lm-eval, TRL, Ray, LangChain, a notebook, ddtrace and openlit with kvhook; another 1 GB"
	@echo "make torture    the step path in C under ASan and UBSan, its reference counts, and its ring; half an hour"
	@echo "make soak       an engine that plays 2,000 steps a second, with readers that are killed; half an hour"
	@echo "                with ARGS=--engine: a real engine with random work instead"
	@echo "make fuzz       forged files of every kind, each given to a verb of the command line; ten minutes"
	@echo "make clean-env  remove .venv"
	@echo
	@echo "PYTHON=/path/to/python3.11 chooses the Python for .venv."
	@echo "ARGS='...' is handed on, as in: make test ARGS='-m \"not engine\" -q'"

setup:
	@$(SETUP)

demo: setup
	@.venv/bin/kvhook demo $(ARGS)

test: setup
	$(PY) -m pytest $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy --strict

# --nitpicky: a reference that leads nowhere is a warning, and so an error. Nothing is fetched.
docs: setup
	$(PY) -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet $(ARGS) docs build/docs
	@echo "The documentation is in build/docs/index.html"

docs-outputs: setup
	REWRITE_DOCS=1 $(PY) -m pytest tests/test_documents.py tests/engine/test_documents.py $(ARGS)

package: setup
	$(PY) tests/packaging/build_and_install.py

# See tests/engines/README.md; the environments are kept in a cache outside of the checkout, 2 GB each.
matrix: setup
	$(PY) tests/engines/matrix.py $(VLLM) $(ARGS)

# See tests/surroundings.py; ten minutes for each on two cores. One: make surroundings ARGS=background
surroundings: setup
	$(PY) tests/surroundings.py $(ARGS)

# See tests/frameworks/environment.py. One: make frameworks ARGS=tests/frameworks/test_ray.py
frameworks: setup
	$(PY) tests/frameworks/environment.py $(ARGS)

# See tests/step/torture.py. Needs gcc with its sanitizers.
torture: setup
	$(PY) tests/step/torture.py $(ARGS)

# See tests/faults/soak.py. KVHOOK_SOAK_SECONDS says how long; half an hour if it is not set. A real engine, with random
# work (tests/faults/soak_engine.py): KVHOOK_SOAK_SECONDS=600 make soak ARGS=--engine
soak: setup
	KVHOOK_SOAK_SECONDS=$${KVHOOK_SOAK_SECONDS:-1800} $(PY) -m tests.faults.$(if $(filter --engine,$(ARGS)),soak_engine,soak)

# See tests/hostile.py. More: make fuzz ARGS=100000; led by coverage, with atheris: make fuzz ARGS='--atheris 600'
fuzz: setup
	$(PY) tests/hostile.py $(or $(ARGS),5000)

clean-env:
	rm -rf .venv
