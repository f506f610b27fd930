#!/usr/bin/env bash
# From this machine's own text to a trained model, in three dimensions of parallelism. Every command is shown before it
# runs, so that it can be copied. Run it through `make demo`; DEMO_STEPS (140) and DEMO_FOLDER (demo) change its length and place.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=${DEMO_STEPS:-140}
HALF=$((STEPS / 2))
OUT=${DEMO_FOLDER:-demo}
# One thread for each of the eight processes: more would only get in each other's way on a small machine.
export OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }
run() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -e "$OUT/.made_by_demo" ]; then
    echo "demo: $OUT holds something else than an earlier demo; choose another DEMO_FOLDER" >&2
    exit 2
fi
rm -rf "$OUT"
mkdir -p "$OUT"
touch "$OUT/.made_by_demo"

say "1. Text that every machine has: the standard library of Python, source and docstrings"
run python tools/collect_text.py --output "$OUT/text.jsonl"

say "2. A byte-level BPE tokenizer of 8,192 tokens"
run python tools/train_tokenizer.py --input "$OUT/text.jsonl" --vocab-size 8192 --output "$OUT/tokenizer.json"

say "3. The text as token ids, in Megatron's .bin/.idx format"
run python tools/preprocess_data.py --input "$OUT/text.jsonl" --output-prefix "$OUT/python" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer.json" --append-eod --workers 2

MODEL=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --seq-length 128
    --untie-embeddings-and-output-weights --init-method-std 0.08)
DATA=(--data-path "$OUT/python_text_document" --split 95,5,0
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer.json")
TRAINING=(--micro-batch-size 4 --global-batch-size 32 --train-iters "$STEPS" --lr 6e-3 --min-lr 2e-4
    --lr-decay-style cosine --lr-warmup-iters $((STEPS / 14)) --weight-decay 0.1 --adam-beta2 0.95
    --eval-interval $((STEPS > 13 ? STEPS / 7 : HALF)) --eval-iters 4 --log-interval $((STEPS / 10)) --save "$OUT/checkpoints")

say "4. Training in eight processes: tensor 2 with sequence parallelism, pipeline 2 with two stages each (interleaved
   1F1B), data 2 with the distributed optimizer. It stops in the middle."
run torchrun --standalone --nproc-per-node 8 pretrain_gpt.py "${MODEL[@]}" "${DATA[@]}" "${TRAINING[@]}" \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --timeline "$OUT/timeline" --timeline-step $((HALF - 2)) \
    --metrics-jsonl "$OUT/first_layout.jsonl" --exit-interval "$HALF"

say "5. On from there under another layout: pipeline 4, data 2. Nothing is converted; the loss goes on where it was."
run torchrun --standalone --nproc-per-node 8 pretrain_gpt.py "${MODEL[@]}" "${DATA[@]}" "${TRAINING[@]}" \
    --pipeline-model-parallel-size 4 --load "$OUT/checkpoints" --metrics-jsonl "$OUT/second_layout.jsonl"

say "6. Pictures of the loss and of the pipeline, as planned and as measured, and a sample of text"
run python tools/plot_metrics.py "$OUT/first_layout.jsonl" "$OUT/second_layout.jsonl" --output "$OUT/loss.png" \
    --labels "tensor 2, pipeline 2 x 2, data 2" "pipeline 4, data 2"
run python tools/schedule.py draw -p 2 -v 2 -m 4 --svg "$OUT/timeline.svg" \
    --measured "$OUT"/timeline.rank0.jsonl "$OUT"/timeline.rank1.jsonl
run python tools/generate.py --load "$OUT/checkpoints" --prompt "def __init__(self" --num-tokens 60 --temperature 0.7

say "Done. Look at $OUT/loss.png and $OUT/timeline.svg"
