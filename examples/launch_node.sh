#!/usr/bin/env bash
# One machine: examples/launch_node.sh RECIPE.yaml [GPUS] [more flags]
#   examples/launch_node.sh examples/recipes/7b_8gpus.yaml 8
set -euo pipefail
recipe=$1
gpus=${2:-8}
exec torchrun --standalone --nproc-per-node "$gpus" pretrain_gpt.py --config "$recipe" "${@:3}"
