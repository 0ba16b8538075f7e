# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# DoReMi on The Pile with the paper's hyperparameters (Xie et al. 2023, section 3 and appendix C): a reference and a
# proxy of 280M, a main model of 8B, each for 200,000 steps of 512 windows of 1,024 tokens.
#
# What differs from the paper: AdamW in place of Adafactor; windows that hold one domain each; the layout.
# Sourced by the scripts of ../slurm. A variable that is already set keeps its value.

DATA=${DATA:-data/pile}
OUT=${OUT:-runs/pile}
# The Pile as it was published: 30 training files and one of held-out text, with meta.pile_set_name.
PILE=${PILE:-raw/pile}
TRAIN_FILES=("$PILE"/train/*.jsonl.zst)
VALID_FILES=("$PILE"/val.jsonl.zst)
# A SentencePiece model of 256,000 pieces, such as tools/train_tokenizer.py makes.
TOKENIZER=${TOKENIZER:-$PILE/tokenizer.model}

# What a run reads, and in which precision; scoring has to agree with the proxy in all of it.
WINDOWS=(--seq-length 1024 --global-batch-size 512 --train-iters 200000 --seed 1234 --bf16)
TRAINING=(
    "${WINDOWS[@]}"
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style exponential --lr-warmup-fraction 0.06
    --weight-decay 0.01 --clip-grad 1.0 --zero-stage 1
    --save-interval 1000 --keep-checkpoints 3 --eval-interval 10000 --eval-iters 1
)
# Reference and proxy on one node of eight GPUs: the shape and the micro-batch only, for a dry run of the score stage
# reads these flags too. The paper's 280M has a tied embedding of 256k rows.
SMALL_MODEL=(--model-size 280m --micro-batch-size 8)
SCORE=("${WINDOWS[@]}" --micro-batch-size 8)
REFERENCE=(--domain-weights natural)
PROXY=(--doremi-step-size 1.0 --doremi-smoothing 1e-3)
# Eight nodes of eight GPUs with 80 GB: 4 ranks share a layer, 2 stages, 8 replicas of 16 micro-batches each.
MAIN_MODEL=(
    --model-size 8b --micro-batch-size 4 --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 2 --recompute-granularity selective
)
