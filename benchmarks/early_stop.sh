#!/usr/bin/env bash
# Trains references and proxies of all steps for benchmarks/early_stop.py, as examples/quickstart.sh does.
#
#     bash benchmarks/early_stop.sh OUT                  # the embedded corpus: six domains and two planted ones
#     bash benchmarks/early_stop.sh OUT TRAIN VALID      # your own: files or folders, as tools/preprocess_data.py takes
#
# SEEDS="11 12 13" selects the seeds; PROXY="--lr-decay-style cosine" adds flags to the proxies. The same command
# resumes. A reference and a proxy take three to five minutes on one core.
set -euo pipefail
if [ $# -ne 1 ] && [ $# -ne 3 ]; then
    echo "usage: bash benchmarks/early_stop.sh OUT [TRAIN VALID]" >&2
    exit 2
fi
OUT=$(realpath -m "$1") TRAIN=${2:+$(realpath "$2")} VALID=${3:+$(realpath "$3")}
SEEDS=${SEEDS:-11 12 13 14 15}
ITERS=${ITERS:-2400}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "$TRAIN" ]; then
    TRAIN=$OUT/corpus/train.jsonl VALID=$OUT/corpus/valid.jsonl
    [ -e "$VALID" ] || "$PYTHON" tools/embedded_corpus.py --output-dir "$OUT/corpus"
fi
if [ ! -e "$OUT/tokenizer.json" ]; then
    "$PYTHON" tools/train_tokenizer.py --input "$TRAIN" --vocab-size 257 --sample-bytes 2000000 \
        --output "$OUT/tokenizer.json"
fi
if [ ! -e "$OUT/data/complete" ]; then
    for split in train valid; do
        [ $split = train ] && input=$TRAIN || input=$VALID
        "$PYTHON" tools/preprocess_data.py --input "$input" --split $split --output-dir "$OUT/data" --append-eod \
            --workers 1 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer.json"
    done
    touch "$OUT/data/complete"
fi

# pretrain SAVE FLAGS...: runs or resumes a phase; its output goes to SAVE.log.
pretrain() {
    "$PYTHON" pretrain_doremi.py --domains "$OUT/data/domains.json" --train-iters "$ITERS" --num-layers 2 \
        --hidden-size 48 --num-attention-heads 4 --position-embedding-type learned_absolute --disable-bias-linear \
        --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1 --seq-length 64 --micro-batch-size 24 \
        --global-batch-size 24 --lr 3e-3 --min-lr 3e-4 --clip-grad 0 --log-interval 500 --eval-iters 2 \
        --save-interval 1200 --keep-checkpoints 1 --save "$1" --load "$1" "${@:2}" >> "$1.log" 2>&1
}

for seed in $SEEDS; do
    pretrain "$OUT/reference-$seed" --phase reference --seed "$seed" --domain-weights uniform
    # shellcheck disable=SC2086  # several words
    pretrain "$OUT/proxy-$seed${TAG:-}" --phase proxy --seed "$seed" --reference-load "$OUT/reference-$seed" ${PROXY:-}
    echo "$(date +%T) $OUT/proxy-$seed${TAG:-}"
done
