#!/usr/bin/env bash
# Runs all of DoReMi on real text, on a CPU, in a few minutes.
#
#     bash examples/quickstart.sh                                # text that is already on this machine
#     bash examples/quickstart.sh TRAIN.jsonl.zst VALID.jsonl    # your own text, with meta.pile_set_name
#
# Environment variables override every setting below: PROXY_ITERS=3000 OUT=runs/longer bash examples/quickstart.sh
# The same command resumes an interrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-runs/quickstart}
NPROC=${NPROC:-2}                             # number of processes
TP=${TP:-1}                                   # tensor parallel size
PP=${PP:-$((NPROC / TP))}                     # pipeline parallel size
VOCAB_SIZE=${VOCAB_SIZE:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-}                  # sets all three numbers of steps below
REFERENCE_ITERS=${REFERENCE_ITERS:-${TRAIN_ITERS:-600}}
PROXY_ITERS=${PROXY_ITERS:-${TRAIN_ITERS:-1000}}
MAIN_ITERS=${MAIN_ITERS:-${TRAIN_ITERS:-400}}
SEQ_LENGTH=${SEQ_LENGTH:-64}                  # tokens per window
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-24}    # windows per step
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-12}
LAYERS=${LAYERS:-2}
HIDDEN=${HIDDEN:-64}                          # hidden size of the reference and the proxy
MAIN_HIDDEN=${MAIN_HIDDEN:-96}                # hidden size of the main model and the baseline
LR=${LR:-4e-3}
SEED=${SEED:-1234}
SAVE_INTERVAL=${SAVE_INTERVAL:-400}
EVAL_ITERS=${EVAL_ITERS:-20}                  # global batches of held-out windows per domain
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # threads per process
if [ "${DEVICE:-cpu}" = cpu ]; then           # DEVICE=gpu uses one GPU per process
    export CUDA_VISIBLE_DEVICES=
fi

if [ $# -ne 0 ] && [ $# -ne 2 ]; then
    echo "usage: bash examples/quickstart.sh [TRAIN.jsonl[.zst|.gz] VALID.jsonl[.zst|.gz]]" >&2
    exit 2
fi
TRAIN=${1:-$OUT/corpus/train.jsonl}
VALID=${2:-$OUT/corpus/valid.jsonl}

source examples/environment.sh
use_environment requirements.txt
SECONDS=0

# Fails before anything is written if OUT holds a run with another corpus or tokenizer.
mkdir -p "$OUT"
settings="$TRAIN $VALID vocabulary $VOCAB_SIZE seed $SEED"
if [ -e "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
    echo "error: $OUT holds a run with other settings: $(cat "$OUT/settings")" >&2
    echo "       this run: $settings; set another OUT or remove that folder" >&2
    exit 2
fi
echo "$settings" >"$OUT/settings"

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

pretrain() { # PHASE NAME ITERS WIDTH [FLAGS]
    local phase=$1 save=$OUT/$2 iters=$3 width=$4
    shift 4
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_doremi.py \
        --phase "$phase" --domains "$OUT/data/domains.json" --save "$save" --load "$save" \
        --train-iters "$iters" --save-interval "$SAVE_INTERVAL" --keep-checkpoints 1 --log-interval 100 \
        --eval-interval 0 --eval-iters "$EVAL_ITERS" --seed "$SEED" \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" \
        --num-layers "$LAYERS" --hidden-size "$width" --ffn-hidden-size $((3 * width)) \
        --num-attention-heads 4 --swiglu --disable-bias-linear --seq-length "$SEQ_LENGTH" \
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" \
        --lr "$LR" --min-lr "$(awk "BEGIN { print $LR / 10 }")" "$@"
}

say "1. Corpus"
if [ $# -eq 0 ] && [ ! -e "$OUT/corpus/valid.jsonl" ]; then
    "$PYTHON" tools/embedded_corpus.py --output-dir "$OUT/corpus" --seed "$SEED"
fi

say "2. Tokenizer and indexed data set"
if [ ! -e "$OUT/tokenizer.model" ]; then
    "$PYTHON" tools/train_tokenizer.py --input "$TRAIN" --vocab-size "$VOCAB_SIZE" --sample-bytes 2000000 \
        --seed "$SEED" --output "$OUT/tokenizer.model"
fi
if [ ! -e "$OUT/data/complete" ]; then
    for split in train valid; do
        if [ $split = train ]; then input=$TRAIN; else input=$VALID; fi
        "$PYTHON" tools/preprocess_data.py --input "$input" --split $split --output-dir "$OUT/data" \
            --tokenizer-model "$OUT/tokenizer.model" --append-eod --workers 2
    done
    touch "$OUT/data/complete"
fi

say "3. Reference model on natural weights"
pretrain reference reference "$REFERENCE_ITERS" "$HIDDEN" --domain-weights natural

say "4. Proxy model, which learns the domain weights against the reference"
pretrain proxy proxy "$PROXY_ITERS" "$HIDDEN" --reference-load "$OUT/reference"

say "5. Wider main model on the learned weights, and a baseline of the same size and budget on natural weights"
pretrain main main "$MAIN_ITERS" "$MAIN_HIDDEN" --domain-weights "$OUT/proxy/domain_weights.json"
pretrain main baseline "$MAIN_ITERS" "$MAIN_HIDDEN" --domain-weights natural

say "6. Report"
"$PYTHON" tools/report.py --reference "$OUT/reference" --proxy "$OUT/proxy" --main "$OUT/main" \
    --baseline "$OUT/baseline" --domains "$OUT/data/domains.json" --output-dir "$OUT/report"
say "Done. Open $OUT/report/report.html; TensorBoard events are in $OUT/*/tensorboard"
