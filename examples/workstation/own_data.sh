# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# DoReMi on your own text, on one to eight GPUs: 150m reference and proxy, 280m main model (shapes of Xie et al. 2023).
# Sourced by run_all.sh. Environment variables override every setting that is written as NAME=${NAME:-...}.
# With examples/slurm, which chooses no layout, give ZERO=1 or more and MICRO_BATCH_SIZE; without VALID_FILES preprocess
# the text first, and leave preprocess out of STAGES.

DATA=${DATA:-data/own}
OUT=${OUT:-runs/own}
# What tools/preprocess_data.py reads: a folder of folders of text, one per domain, files with the domain in
# meta.pile_set_name, ... It holds out a part for evaluation; VALID_FILES=(...) names other text for that.
TEXT=${TEXT:-raw/own}
TRAIN_FILES=("$TEXT")
# Trained on the text if the file does not exist.
TOKENIZER=${TOKENIZER:-$DATA/tokenizer.model}
VOCAB_SIZE=${VOCAB_SIZE:-32000}

SMALL_SIZE=${SMALL_SIZE:-150m}                  # reference and proxy
MAIN_SIZE=${MAIN_SIZE:-280m}
STEPS=${STEPS:-20000}                           # of each of the three; 5.2 billion tokens with these batches
SEQ_LENGTH=${SEQ_LENGTH:-1024}                  # tokens per window
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}     # windows per step; run_all.sh adds the layout and the micro-batch
PRECISION=(--bf16)
if [ "${DEVICE:-gpu}" = cpu ]; then
    PRECISION=()
fi

WINDOWS=(
    --seq-length "$SEQ_LENGTH" --global-batch-size "$GLOBAL_BATCH_SIZE" --train-iters "$STEPS" --seed 1234
    "${PRECISION[@]}" ${MICRO_BATCH_SIZE:+--micro-batch-size "$MICRO_BATCH_SIZE"}
)
TRAINING=(
    "${WINDOWS[@]}"
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.01 --clip-grad 1.0
    ${ZERO:+--zero-stage "$ZERO"}
    --save-interval 1000 --keep-checkpoints 2 --eval-interval 1000 --eval-iters 1
)
SMALL_MODEL=(--model-size "$SMALL_SIZE")
MAIN_MODEL=(--model-size "$MAIN_SIZE")
SCORE=("${WINDOWS[@]}")
REFERENCE=(--domain-weights natural)
PROXY=()
