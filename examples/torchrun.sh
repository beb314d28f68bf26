#!/usr/bin/env bash
# One node, or several by hand, with torchrun and nothing else. On every node, with the same HOST:
#
#   NODES=2 HOST=node-0 examples/torchrun.sh --config qwen3-0.6b-from-4b --output-dir /shared/runs/qwen3
#
# NODES    how many nodes (default 1)        GPUS  processes per node (default: one for each GPU, or one without)
# HOST     name of one of the nodes, where the processes meet; PORT  a free port there (default 29500)
#
# Weights are whole on every process (DDP). To shard them, add to the recipe, or here, `--fsdp true`: transformers then
# sets FSDP2 up as src/trb/recipes/accelerate/fsdp2.yaml does. The output directory must be one that all nodes see.
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
exec torchrun \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "$((gpus > 0 ? gpus : 1))" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" \
  --rdzv-id "${SLURM_JOB_ID:-trb}" \
  -m trb train "$@"
