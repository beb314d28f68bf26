#!/usr/bin/env bash
# One GPU, under ten minutes: check the fused solver, then measure it, the samplers and a distillation step.
# Needs torch, transformers and triton. Writes benchmarks/results/gpu.json; see benchmarks/gpu.py --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
