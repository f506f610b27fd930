#!/usr/bin/env bash
# A BERT from this machine's own text: trained in tensor and pipeline parallelism, and on from there in data parallelism.
# Every command is shown before it runs. BERT_STEPS (200), BERT_MEGABYTES (4) and BERT_FOLDER (demo_bert) change its length,
# its text and its place.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=${BERT_STEPS:-200}
HALF=$((STEPS / 2))
OUT=${BERT_FOLDER:-demo_bert}
# One thread for each process: more would only get in each other's way on a small machine.
export OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }
run() {
    printf '$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

mkdir -p "$OUT"

say "1. Text that every machine has, and a WordPiece vocabulary of 2,048 tokens"
run python tools/collect_text.py --output "$OUT/text.jsonl" --max-megabytes "${BERT_MEGABYTES:-4}"
run python tools/train_tokenizer.py --input "$OUT/text.jsonl" --type wordpiece --lower-case --vocab-size 2048 \
    --output "$OUT/vocab.txt"

say "2. The text as token ids, sentence by sentence: a sample of BERT is two texts of one document"
TOKENIZER=(--tokenizer-type BertWordPieceLowerCase --vocab-file "$OUT/vocab.txt")
run python tools/preprocess_data.py --input "$OUT/text.jsonl" --output-prefix "$OUT/python" "${TOKENIZER[@]}" \
    --split-sentences --workers 2 --overwrite

MODEL=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --init-method-std 0.05
    --apply-residual-connection-post-layernorm)
DATA=(--data-path "$OUT/python_text_sentence" --split 95,5,0 "${TOKENIZER[@]}")
TRAINING=(--micro-batch-size 4 --global-batch-size 16 --train-iters "$STEPS" --lr 2e-3 --min-lr 1e-4
    --lr-decay-style cosine --lr-warmup-iters $((STEPS / 10)) --weight-decay 0.01
    --eval-interval "$HALF" --eval-iters 4 --log-interval $((STEPS / 10)) --save "$OUT/checkpoints")

say "3. Training in four processes: tensor 2 with sequence parallelism, pipeline 2 with two stages each. It stops in the
   middle. Both losses are in the log: that of masked words, and that of the order of two texts."
run torchrun --standalone --nproc-per-node 4 pretrain_bert.py "${MODEL[@]}" "${DATA[@]}" "${TRAINING[@]}" \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 \
    --metrics-jsonl "$OUT/first_layout.jsonl" --exit-interval "$HALF"

say "4. On from there in data parallelism. Nothing is converted; the losses go on where they were."
run torchrun --standalone --nproc-per-node 2 pretrain_bert.py "${MODEL[@]}" "${DATA[@]}" "${TRAINING[@]}" \
    --use-distributed-optimizer --load "$OUT/checkpoints" --metrics-jsonl "$OUT/second_layout.jsonl"

say "Done. The checkpoints are in $OUT/checkpoints, the losses in $OUT/*_layout.jsonl"
