#!/usr/bin/env bash
# Runs all of DoReMi on CPUs in some minutes, with seeds, and says what can be concluded from the result.
#
#     bash examples/quickstart.sh                  # text that is already on this machine
#     bash examples/quickstart.sh TRAIN [VALID]    # your own: files or folders, as tools/preprocess_data.py takes them
#
# Environment variables override every setting below: SEEDS=5 OUT=runs/longer bash examples/quickstart.sh
# The same command resumes an interrupted run.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-runs/quickstart}
SEEDS=${SEEDS:-3}                             # seeds, each with its own reference, proxy, main model and rivals
NPROC=${NPROC:-1}                             # processes of a run: replicas, unless TP or PP say otherwise
TP=${TP:-1}                                   # tensor parallel size
PP=${PP:-1}                                   # pipeline parallel size
JOBS=${JOBS:-}                                # runs at a time (default: cores / NPROC)
VOCAB_SIZE=${VOCAB_SIZE:-257}                 # 257: bytes, and the end of a document
TRAIN_ITERS=${TRAIN_ITERS:-2400}              # steps of every run
SEQ_LENGTH=${SEQ_LENGTH:-64}                  # tokens per window
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-24}    # windows per step
LAYERS=${LAYERS:-2}
HIDDEN=${HIDDEN:-48}                          # hidden size of every model
LR=${LR:-3e-3}
SAVE_INTERVAL=${SAVE_INTERVAL:-1200}
EPOCHS=${EPOCHS:-1}                           # of a domain at most, under UniMax
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # threads per process
if [ "${DEVICE:-cpu}" = cpu ]; then           # DEVICE=gpu uses one GPU per process
    export CUDA_VISIBLE_DEVICES=
fi

# fail MESSAGE...: prints a user's mistake and ends the script.
fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -eq 1 ] || printf '       %s\n' "${@:2}" >&2
    exit 2
}
if [ $# -gt 2 ]; then
    fail "usage: bash examples/quickstart.sh [TRAIN [VALID]]"
fi
for name in SEEDS NPROC TP PP ${JOBS:+JOBS} VOCAB_SIZE TRAIN_ITERS SEQ_LENGTH GLOBAL_BATCH_SIZE; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}" "give a whole number of 1 or more"
done
if [ $((NPROC % (TP * PP))) -ne 0 ] || [ $((GLOBAL_BATCH_SIZE % (NPROC / (TP * PP)))) -ne 0 ]; then
    fail "NPROC=$NPROC TP=$TP PP=$PP GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE do not divide" \
        "NPROC must be a multiple of TP x PP, GLOBAL_BATCH_SIZE a multiple of NPROC / (TP x PP)"
fi
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-$((GLOBAL_BATCH_SIZE * TP * PP / NPROC))}
TRAIN=${1:-$OUT/corpus/train.jsonl}
VALID=${2:-}
if [ $# -eq 0 ]; then
    VALID=$OUT/corpus/valid.jsonl
elif [ "$called_from" != "$PWD" ]; then
    # Paths are those of the folder in which the script was called.
    [[ $TRAIN == /* ]] || TRAIN=$called_from/$TRAIN
    [[ -z $VALID || $VALID == /* ]] || VALID=$called_from/$VALID
fi

source examples/environment.sh
use_environment requirements.txt
cores=$(env -u OMP_NUM_THREADS nproc)
JOBS=${JOBS:-$((cores > NPROC ? cores / NPROC : 1))}
SECONDS=0

# Fails before anything is written if OUT holds a run of other settings; without runs, the data can still be used.
settings=$(printf '%s\n' "TRAIN=$TRAIN" "VALID=$VALID" "VOCAB_SIZE=$VOCAB_SIZE" "TRAIN_ITERS=$TRAIN_ITERS" \
    "SEQ_LENGTH=$SEQ_LENGTH" "GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE" "LAYERS=$LAYERS" "HIDDEN=$HIDDEN" "LR=$LR" \
    "EPOCHS=$EPOCHS")
if [ -e "$OUT/settings" ]; then
    lines=10
    compgen -G "$OUT/seed-*" > /dev/null || lines=3
    changed=$(diff <(head -n "$lines" "$OUT/settings") <(head -n "$lines" <<< "$settings") || true)
    changed=$(sed -n -e 's/^< /there: /p' -e 's/^> /here:  /p' <<< "$changed")
    if [ -n "$changed" ]; then
        mapfile -t changed <<< "$changed"
        fail "$OUT holds a run of other settings" "${changed[@]}" "set another OUT, or remove that folder"
    fi
fi

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

say "1. Text"
if [ $# -eq 0 ] && [ ! -e "$OUT/corpus/valid.jsonl" ]; then
    "$PYTHON" tools/embedded_corpus.py --output-dir "$OUT/corpus"
fi

say "2. Tokenizer and indexed data"
if [ ! -e "$OUT/tokenizer.json" ]; then
    "$PYTHON" tools/train_tokenizer.py --input "$TRAIN" --vocab-size "$VOCAB_SIZE" --sample-bytes 2000000 \
        --output "$OUT/tokenizer.json"
fi
echo "$settings" > "$OUT/settings"
# index INPUT [FLAGS]: adds a file or folder to the data set.
index() {
    "$PYTHON" tools/preprocess_data.py --input "$@" --output-dir "$OUT/data" --append-eod --workers 2 \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/tokenizer.json"
}
if [ ! -e "$OUT/data/complete" ]; then
    if [ -n "$VALID" ]; then
        index "$TRAIN" --split train
        if [ $# -eq 0 ]; then
            # The corpus has said what it holds out.
            mkdir -p "$OUT/logs"
            index "$VALID" --split valid > "$OUT/logs/preprocess-valid.log"
        else
            index "$VALID" --split valid
        fi
    else
        index "$TRAIN"
    fi
    if ! grep -q '"valid": "' "$OUT/data/domains.json"; then
        fail "no document is held out, so the runs cannot be compared" \
            "give more text, or held-out text of your own as VALID, and another OUT"
    fi
    touch "$OUT/data/complete"
fi

# pretrain FLAGS...: runs a phase of one model. Every model has the same shape, and every run the same budget.
pretrain() {
    "$PYTHON" pretrain_doremi.py --nproc-per-node "$NPROC" --domains "$OUT/data/domains.json" \
        --train-iters "$TRAIN_ITERS" \
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --num-layers "$LAYERS" \
        --hidden-size "$HIDDEN" --num-attention-heads 4 --position-embedding-type learned_absolute \
        --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by "$TP" \
        --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" \
        --lr "$LR" --min-lr "$(awk "BEGIN { print $LR / 10 }")" --clip-grad 0 "$@"
}

# train SEED NAME: trains one of a seed's models; its output goes to a log.
train() {
    local seed=$1 name=$2 folder=$OUT/seed-$1/$2 log=$OUT/logs/seed-$1-$2.log needs flags
    case $name in
    uniform) flags=(--phase reference --domain-weights uniform) ;;
    natural) flags=(--phase main --domain-weights natural) ;;
    proxy) needs=uniform flags=(--phase proxy --reference-load "$OUT/seed-$seed/uniform") ;;
    doremi) needs=proxy flags=(--phase main --domain-weights "$OUT/seed-$seed/proxy/domain_weights.json") ;;
    unimax) flags=(--phase main --domain-weights unimax --max-epochs-per-domain "$EPOCHS") ;;
    esac
    # The run that it needs is under way: the list below is in order.
    until [ -z "${needs:-}" ] || [ -e "$OUT/seed-$seed/$needs/finished" ]; do
        sleep 0.2
    done
    SECONDS=0
    if ! pretrain --save "$folder" --load "$folder" --seed "$seed" --save-interval "$SAVE_INTERVAL" \
        --keep-checkpoints 1 --log-interval 100 "${flags[@]}" > "$log" 2>&1; then
        printf 'error: seed %s, %s: the end of %s:\n' "$seed" "$name" "$log" >&2
        tail -n 15 "$log" >&2
        return 1
    fi
    touch "$folder/finished"
    printf '%s  seed %-3s %-8s %4d s  %s\n' "$(date +%T)" "$seed" "$name" "$SECONDS" \
        "$(sed -n 's/.*held-out \(.*\), token mean.*/\1/p' "$log" | tail -n 1)"
}

# progress: prints how many steps the runs under way have taken; on a terminal, over the line before.
progress() {
    local folder steps text=""
    for folder in "$OUT"/seed-*/*; do
        if [ -s "$folder/metrics.jsonl" ] && [ ! -e "$folder/finished" ]; then
            steps=$(tail -n 1 "$folder/metrics.jsonl" | sed -n 's/^{"iteration": \([0-9]*\),.*/\1/p')
            text+="  ${folder#"$OUT"/} ${steps:-0}"
        fi
    done
    if [ -t 1 ]; then
        printf '\r\033[K%s / %s steps' "${text:0:100}" "$TRAIN_ITERS"
    elif [ -n "$text" ]; then
        printf '%s%s / %s steps\n' "$(date +%T)" "${text:0:95}" "$TRAIN_ITERS"
    fi
}

# plan WEIGHTS [FLAGS]: prints the table of the domains in a dry run, without the line that names the mixture.
plan() {
    pretrain --phase main --save "$OUT/plan" --dry-run --domain-weights "$@" | sed -e '1,/^mixture/d'
}

# Data and settings on which a run could not start are found before the first one.
pretrain --phase proxy --save "$OUT/plan" --reference-load "$OUT/plan" --dry-run > /dev/null

mkdir -p "$OUT/logs"
names=(uniform natural)
unimax_note=""
if unimax=$(plan unimax --max-epochs-per-domain "$EPOCHS" 2> "$OUT/logs/unimax-plan.log"); then
    if [ "$unimax" != "$(plan uniform 2> /dev/null)" ]; then
        names+=(unimax)
    else
        unimax_note="UniMax's weights are the uniform ones here: at most $EPOCHS epoch of a domain is read"
    fi
else
    unimax_note="no UniMax: the runs read more than $EPOCHS epoch of all text"
fi
names+=(proxy doremi)
say "3. Runs, $JOBS at a time: ${names[*]}; seeds 1 to $SEEDS"
if [ -n "$unimax_note" ]; then
    echo "$unimax_note"
fi

queue=()
for name in "${names[@]}"; do
    for seed in $(seq 1 "$SEEDS"); do
        if [ ! -e "$OUT/seed-$seed/$name/finished" ]; then
            queue+=("$seed $name")
        fi
    done
done

# Each run is a process group of its own, so that a signal reaches all of its processes: they save and can be resumed.
set -m
running=()
# stop CODE: ends the runs under way, and the script.
stop() {
    trap - EXIT INT TERM
    for pid in "${running[@]}"; do
        kill -TERM -- "-$pid" 2> /dev/null || true
    done
    # Bash would name each run that it ends.
    { wait; } 2> /dev/null
    if [ "$1" -ne 0 ]; then
        echo "stopped; the same command resumes" >&2
    fi
    exit "$1"
}
trap 'stop $?' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
# In a log file a line of progress comes often at first, then rarely: runs that finish have lines of their own.
began=$SECONDS
due=$((SECONDS + 30))
while [ ${#queue[@]} -gt 0 ] || [ ${#running[@]} -gt 0 ]; do
    while [ ${#queue[@]} -gt 0 ] && [ ${#running[@]} -lt "$JOBS" ]; do
        # shellcheck disable=SC2086  # two words
        train ${queue[0]} &
        running+=($!)
        queue=("${queue[@]:1}")
    done
    sleep 0.5
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            left+=("$pid")
        else
            wait "$pid"
        fi
    done
    running=("${left[@]}")
    if [ -t 1 ] || [ "$SECONDS" -ge "$due" ]; then
        progress
        pause=$(((SECONDS - began) / 2))
        pause=$((pause < 30 ? 30 : pause > 300 ? 300 : pause))
        due=$((SECONDS + pause))
    fi
done
set +m
trap - EXIT INT TERM

say "4. Report"
# group NAME: prints the runs of a name, one for each seed, as tools/report.py takes them.
group() { printf '%s\n' --group "$1=$OUT/seed-1/$1" && seq -f "$OUT/seed-%g/$1" 2 "$SEEDS"; }
mapfile -t groups < <(
    for name in doremi uniform natural unimax proxy; do
        if [[ " ${names[*]} " == *" $name "* ]]; then
            group "$name"
        fi
    done
)
if [ $# -eq 0 ]; then
    # Noise cannot be learned and boilerplate is learned at once: they test the weights, not the models.
    groups+=(--control-domains noise boilerplate)
fi
"$PYTHON" tools/report.py "${groups[@]}" --domains "$OUT/data/domains.json" --output-dir "$OUT/report"
say "Done. Open $OUT/report/report.html; the logs of the runs are in $OUT/logs"
echo "Learned weights, of each seed: --domain-weights $OUT/seed-1/proxy/domain_weights.json$([ "$SEEDS" = 1 ] || echo ' ...')"
