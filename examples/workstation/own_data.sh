# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# DoReMi on your own text, on one to eight GPUs: 150m reference and proxy, 280m main model (shapes of Xie et al. 2023).
# Sourced by run_all.sh. Environment variables override TEXT, DATA, OUT, TOKENIZER, VOCAB_SIZE and STEPS.

DATA=${DATA:-data/own}
OUT=${OUT:-runs/own}
# A folder of folders of text, one per domain, or files with the domain in meta.pile_set_name. One document in a hundred
# is held out for evaluation.
TEXT=${TEXT:-raw/own}
TRAIN_FILES=("$TEXT")
OPTIONS=(--valid-fraction 0.01)
# Trained on the text if the file does not exist.
TOKENIZER=${TOKENIZER:-$DATA/tokenizer.model}
VOCAB_SIZE=${VOCAB_SIZE:-32000}

# 20,000 steps of 256 windows of 1,024 tokens are 5.2 billion tokens. run_all.sh adds the layout and the micro-batch.
WINDOWS=(--seq-length 1024 --global-batch-size 256 --train-iters "${STEPS:-20000}" --seed 1234 --bf16)
TRAINING=(
    "${WINDOWS[@]}"
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.01 --clip-grad 1.0
    --save-interval 1000 --keep-checkpoints 2 --eval-interval 1000 --eval-iters 1
)
SMALL_MODEL=(--model-size 150m)
MAIN_MODEL=(--model-size 280m)
SCORE=("${WINDOWS[@]}")
REFERENCE=(--domain-weights natural)
PROXY=()
