"""Flags of launch scripts for Megatron-LM, names of files made up.

Where a comment names a file of Megatron-LM's, its flags stand as they are published; the others were put together from
flags that such scripts commonly have.
"""

from __future__ import annotations

_FILES = "--save checkpoints --load checkpoints --tensorboard-dir logs"
_GPT2 = "--data-path corpus_text_document --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --split 949,50,1"

# name -> (GPUs, command line, parameters as the paper or model card counts them, in billions)
SCRIPTS = {
    # as scripts of 2023 and before have it
    "gpt3 345M": (
        8,
        f"""--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --num-layers 24
        --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
        --micro-batch-size 4 --global-batch-size 16 --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000
        --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --fp16
        {_GPT2} --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
        --distributed-backend nccl --save checkpoints --load checkpoints""",
        0.355,
    ),
    # examples/gpt3/train_gpt3_175b_distributed.sh
    "gpt3 175B": (
        128,
        f"""--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
        --max-position-embeddings 2048 --attention-backend auto --micro-batch-size 1 --global-batch-size 1536
        --rampup-batch-size 16 16 5859375 --train-iters 500000 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
        --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
        --lr-warmup-fraction .001 --lr-decay-iters 430000 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 16 {_GPT2} --log-interval 100 --save-interval 10000 --eval-interval 1000
        --eval-iters 10 {_FILES}""",
        174.6,
    ),
    # as handbooks of clusters have it
    "llama2 7B": (
        8,
        """--use-mcore-models --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --sequence-parallel
        --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32
        --tokenizer-type Llama2Tokenizer --tokenizer-model tokenizer.model --seq-length 4096
        --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 256
        --make-vocab-size-divisible-by 1 --lr 3.0e-4 --train-iters 5000 --lr-decay-style cosine
        --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0.0 --init-method-std 0.01
        --hidden-dropout 0.0 --position-embedding-type rope --no-position-embedding --normalization RMSNorm --swiglu
        --use-flash-attn --no-masked-softmax-fusion --attention-softmax-in-fp32 --min-lr 3.0e-5 --weight-decay 1e-1
        --lr-warmup-fraction 0.01 --clip-grad 1.0 --adam-beta1 0.9 --initial-loss-scale 65536 --adam-beta2 0.95
        --no-gradient-accumulation-fusion --no-load-optim --no-load-rng --use-distributed-optimizer
        --overlap-grad-reduce --bf16 --data-path llama2_text_document --split 100,0,0 --log-interval 1
        --save-interval 1000 --eval-interval 1000 --eval-iters 0 --log-throughput --timing-log-level 1
        --timing-log-option minmax --distributed-backend nccl --save checkpoints --load llama2""",
        6.74,
    ),
    # examples/llama/train_llama3_8b_h100_fp8.sh with DTYPE=bf16 and mock data
    "llama3 8B": (
        8,
        f"""--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
        --group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
        --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
        --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused
        --apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1
        --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252
        --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine
        --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
        --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
        --exit-duration-in-mins 235 --tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --mock-data
        --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path cache --tiktoken-pattern v2
        --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1
        --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile --profile-step-start 4
        --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 {_FILES}""",
        8.03,
    ),
    # A Llama-3 recipe for Megatron-LM at 64 GPUs: tensor 4, pipeline 8, 5 virtual stages
    "llama3 70B": (
        64,
        """--use-mcore-models --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64
        --group-query-attention --num-query-groups 8 --seq-length 8192 --max-position-embeddings 131072
        --position-embedding-type rope --use-rope-scaling --rope-scaling-factor 8.0 --rotary-base 500000
        --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear --attention-dropout 0.0
        --hidden-dropout 0.0 --untie-embeddings-and-output-weights --transformer-impl transformer_engine
        --micro-batch-size 1 --global-batch-size 256 --train-iters 100000 --lr 1.5e-4 --min-lr 1.0e-5
        --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9
        --adam-beta2 0.95 --bf16 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 8
        --num-layers-per-virtual-pipeline-stage 2 --sequence-parallel --use-distributed-optimizer
        --overlap-grad-reduce --overlap-param-gather --no-overlap-p2p-communication --tp-comm-overlap
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3 --vocab-size 128256 --data-path corpus
        --split 99,1,0 --log-interval 1 --save-interval 500 --eval-interval 500 --eval-iters 32 --save checkpoints
        --ckpt-format torch_dist --async-save --manual-gc --manual-gc-interval 100 --recompute-activations""",
        70.6,
    ),
    # examples/bert/train_bert_340m_distributed.sh
    "bert 340M": (
        128,
        f"""--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --max-position-embeddings 512
        --attention-backend auto --micro-batch-size 4 --global-batch-size 32 --train-iters 1000000 --weight-decay 1e-2
        --clip-grad 1.0 --fp16 --lr 0.0001 --lr-decay-iters 990000 --lr-decay-style linear --min-lr 1.0e-5
        --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --tensor-model-parallel-size 8
        --pipeline-model-parallel-size 16 --data-path corpus_text_sentence --vocab-file bert-vocab.txt
        --split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10 {_FILES}""",
        0.336,
    ),
}
