# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# DoReMi on The Pile with the paper's hyperparameters (Xie et al. 2023, section 3 and appendix C): a 280M reference, a
# 280M proxy and an 8B main model, each trained for 200,000 steps of 512 windows of 1,024 tokens.
#
# Differences from the paper: AdamW instead of Adafactor, one domain per window, and the parallel layout.
# Sourced by the scripts in ../slurm. Environment variables override DATA, OUT, PILE, TOKENIZER,
# SMALL_SIZE (reference and proxy), OBJECTIVE and MAIN_SIZE.

DATA=${DATA:-data/pile}
OUT=${OUT:-runs/pile}
# The Pile as published: 30 training files and one validation file, with the domain in meta.pile_set_name.
PILE=${PILE:-raw/pile}
TRAIN_FILES=("$PILE"/train/*.jsonl.zst)
VALID_FILES=("$PILE"/val.jsonl.zst)
# A SentencePiece model with 256,000 pieces, for example from tools/train_tokenizer.py.
TOKENIZER=${TOKENIZER:-$PILE/tokenizer.model}

# The windows of a run and its precision. They must be the same for scoring as for the proxy.
WINDOWS=(--seq-length 1024 --global-batch-size 512 --train-iters 200000 --seed 1234 --bf16)
TRAINING=(
    "${WINDOWS[@]}"
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style exponential --lr-warmup-fraction 0.06
    --weight-decay 0.01 --clip-grad 1.0 --zero-stage 1
    --save-interval 1000 --keep-checkpoints 3 --eval-interval 10000 --eval-iters 1
)
# The reference and the proxy, for one node of eight GPUs. Only the shape and the micro-batch size belong here, because
# a dry run of the score stage reads these flags too. The paper's 280M model has a tied embedding of 256k rows.
SMALL_MODEL=(--model-size "${SMALL_SIZE:-280m}" --micro-batch-size 8)
SCORE=("${WINDOWS[@]}" --micro-batch-size 8)
REFERENCE=(--domain-weights natural)
PROXY=(--doremi-step-size 1.0 --doremi-smoothing 1e-3 --doremi-objective "${OBJECTIVE:-excess}")
if [ "${SMALL_SIZE:-280m}" = 1b ]; then
    # A proxy holds the activations of all micro-batches of a step, at this size more than 80 GiB leave room for.
    PROXY+=(--recompute-granularity full)
fi
# For eight nodes of eight 80 GB GPUs: TP 4, PP 2 and DP 8, with 16 micro-batches per replica in a step.
MAIN_MODEL=(
    --model-size 8b --micro-batch-size 4 --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 2 --recompute-granularity selective
)
if [ "${MAIN_SIZE:-8b}" != 8b ]; then
    # On the nodes of the small models, which the site file names.
    MAIN_MODEL=(--model-size "$MAIN_SIZE" --micro-batch-size 8)
    MAIN_JOB=("${SMALL_JOB[@]}")
fi
