#!/usr/bin/env bash
#SBATCH --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
# Several machines under Slurm, one launcher on each: sbatch --nodes 8 examples/launch_slurm.sh RECIPE.yaml [more flags]
# All machines see the same folders. A plan before the job waits in the queue:
#   python pretrain_gpt.py --config RECIPE.yaml --dry-run --world-size 64
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" pretrain_gpt.py --config "$1" "${@:2}"
