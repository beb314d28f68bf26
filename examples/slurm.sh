#!/usr/bin/env bash
# Several nodes under Slurm, with Accelerate: one launcher per node, which starts one process per GPU.
#
#   sbatch examples/slurm.sh fsdp2 --config qwen3-1.7b-from-8b --output-dir /shared/runs/qwen3
#
# The first argument is a file of src/trb/recipes/accelerate (ddp, fsdp2, zero3); the rest is for `trb train`. The output
# directory must be on a file system that all nodes see. Requeued after a time limit, the job goes on from its last checkpoint.
#SBATCH --job-name=trb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

config=$1
shift
export HOST PORT PROCESSES
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not meet at one port
PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))

# SLURM_NODEID is each node's own number, so it must be read there and not here.
srun bash -c 'exec accelerate launch \
  --config_file "src/trb/recipes/accelerate/$0.yaml" \
  --num_machines "$SLURM_NNODES" \
  --num_processes "$PROCESSES" \
  --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$HOST" \
  --main_process_port "$PORT" \
  -m trb train "$@"' "$config" "$@"
