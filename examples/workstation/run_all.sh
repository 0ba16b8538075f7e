#!/usr/bin/env bash
# Runs all of DoReMi on the GPUs of this machine: tokenizer, data, reference, proxy, main model, report.
#
#     bash examples/workstation/run_all.sh examples/workstation/own_data.sh
#     DRY_RUN=1 bash examples/workstation/run_all.sh EXPERIMENT    # plans all stages and starts none; with NPROC and
#                                                                  # DEVICE_MEMORY_GIB for another machine
#
# The same command resumes an interrupted run. For each stage the dry run chooses the layout that fits the GPUs
# (--suggest-layout) and prints why. Environment variables:
#
#     NPROC=4             processes; default: the visible GPUs
#     DEVICE=cpu          train on CPUs
#     TP=1 PP=2 ZERO=2    tensor and pipeline parallel size, ZeRO stage: what is given is kept, the rest is chosen
#     MICRO_BATCH_SIZE=4  windows in a forward pass; default: what fits, from the global batch
#     DEVICE_MEMORY_GIB   memory of a device; default: that of the GPU
#     STAGES="proxy main" the stages to run. With `score` between reference and proxy the reference's losses are
#                         recorded once; otherwise the reference runs on each batch of the proxy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

EXPERIMENT=${1:-examples/workstation/own_data.sh}
STAGES=${STAGES:-tokenizer preprocess reference proxy main report}
DEVICE=${DEVICE:-gpu}
DRY_RUN=${DRY_RUN:-}

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -le 1 ] || fail "usage: bash examples/workstation/run_all.sh [EXPERIMENT]"
{ [ -f "$EXPERIMENT" ] && [ -r "$EXPERIMENT" ]; } || fail "the experiment $EXPERIMENT is missing; see examples/workstation/own_data.sh"
for stage in $STAGES; do
    case $stage in
    tokenizer | preprocess | reference | score | proxy | main | report) ;;
    *) fail "unknown stage '$stage' in STAGES; the stages are tokenizer preprocess reference score proxy main report" ;;
    esac
done
case $DEVICE in
gpu) ;;
cpu) export CUDA_VISIBLE_DEVICES= ;;
*) fail "DEVICE=$DEVICE: give gpu or cpu" ;;
esac
source examples/environment.sh
use_environment requirements.txt
cores=$(getconf _NPROCESSORS_ONLN)
VALID_FILES=()
# shellcheck source=examples/workstation/own_data.sh
source "$EXPERIMENT"
for name in DATA OUT TRAINING SMALL_MODEL MAIN_MODEL REFERENCE PROXY; do
    declare -p "$name" > /dev/null 2>&1 || fail "$EXPERIMENT does not set $name; see examples/workstation/own_data.sh"
done
# shellcheck source=examples/stages.sh
source examples/stages.sh

# One process per GPU.
gpus=0
if [ "$DEVICE" = gpu ] && [ -n "$DRY_RUN" ] && [ -n "${NPROC:-}" ] && [ -n "${DEVICE_MEMORY_GIB:-}" ]; then
    # The plan of another machine.
    DEVICE="$NPROC GPUs of $DEVICE_MEMORY_GIB GiB"
elif [ "$DEVICE" = gpu ]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 0 ] || fail "$PYTHON sees no GPU (torch.cuda.device_count() is 0); DEVICE=cpu trains on CPUs"
    NPROC=${NPROC:-$gpus}
    # Otherwise the allocator's cache can take several GiB that no tensor uses.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
else
    NPROC=${NPROC:-$((cores < 8 ? cores : 8))}
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC: give a number of processes"
if [ "$gpus" -gt 0 ] && [ "$NPROC" -gt "$gpus" ]; then
    fail "NPROC=$NPROC, but PyTorch sees $gpus GPU(s); give NPROC=$gpus or less"
fi
threads=$((cores / NPROC))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
memory=(${DEVICE_MEMORY_GIB:+--device-memory-gib "$DEVICE_MEMORY_GIB"})
if [ "$DEVICE" = cpu ] && [ -z "${DEVICE_MEMORY_GIB:-}" ] && [ -r /proc/meminfo ]; then
    # The processes share the memory that is free now.
    memory=(--device-memory-gib "$(awk -v n="$NPROC" '/MemAvailable/ { printf "%.3f", $2 / 1048576 / n }' /proc/meminfo)")
fi
given=(${TP:+--tensor-model-parallel-size "$TP"} ${PP:+--pipeline-model-parallel-size "$PP"}
    ${MICRO_BATCH_SIZE:+--micro-batch-size "$MICRO_BATCH_SIZE"})
# runs STAGE: whether it is one of STAGES.
runs() { [ -n "$1" ] && [[ " $STAGES " == *" $1 "* ]]; }
if ! runs score && [ ! -e "$OUT/scores/scores.json" ]; then
    REFERENCE_SOURCE=online
fi
SECONDS=0
say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# phase_command STAGE: sets COMMAND to pretrain_doremi.py with the flags of a stage.
phase_command() {
    stage_flags "$1"
    local stage_given=("${given[@]}")
    if [ "$1" != score ] && [ -n "${ZERO:-}" ]; then
        stage_given+=(--zero-stage "$ZERO")
    fi
    COMMAND=(pretrain_doremi.py --phase "$1" --domains "$DATA/domains.json" "${FLAGS[@]}" "${stage_given[@]}")
}

# plan STAGE [EARLIER]: chooses the layout of a stage, prints why, and sets LAYOUT[STAGE] to its flags; writes nothing. If
# the stage EARLIER runs as well, its results count as still to come, even if there are some of an interrupted run.
# Before the data exist, only the flags are checked: the manifest is then the one fault.
declare -A LAYOUT
plan() {
    local plan_text COMMAND FLAGS code=0
    if runs "${2:-}"; then
        DRY_RUN=1 OUT=$OUT/to-come phase_command "$1"
    else
        DRY_RUN=1 phase_command "$1"
    fi
    plan_text=$("$PYTHON" "${COMMAND[@]}" "${memory[@]}" --dry-run --dry-run-world-size "$NPROC" --suggest-layout 2>&1) \
        || code=$?
    if [ "$code" -ne 0 ]; then
        if [ ! -e "$DATA/domains.json" ] && [[ $plan_text == *"error: 1 fault in the input:"*"domains.json"* ]]; then
            echo "$1: the flags are valid; $DATA/domains.json does not exist yet, so the layout is chosen later"
            return
        fi
        printf '%s: %s\n' "$1" "$plan_text" >&2
        exit "$code"
    fi
    # The lines below the last "flags of the best layout (...):", which backslashes continue.
    local flags=${plan_text##*$'\n'flags of the best layout*:$'\n'}
    LAYOUT[$1]=${flags//\\$'\n'/ }
    printf '\n%s:\n' "$1"
    if [ -n "$DRY_RUN" ]; then
        with_final_paths <<< "$plan_text"
    else
        # The best layout and what was rejected.
        sed -n -e '/^  layout/,+1p' -e '/^rejected/,/^flags/{/^flags/!p}' <<< "$plan_text"
    fi
}

plan_all() {
    if runs reference; then plan reference; fi
    if runs score; then plan score reference; fi
    if runs proxy; then
        if [ "${REFERENCE_SOURCE:-}" = online ]; then plan proxy reference; else plan proxy score; fi
    fi
    if runs main; then plan main proxy; fi
}

# logged NAME COMMAND...: runs a command with its output in OUT/logs/NAME.log as well. An interrupt reaches the command,
# which saves and stops, and must not end tee before it.
logged() {
    local name=$1 code=0
    shift
    "$@" 2>&1 | tee -a -i "$OUT/logs/$name.log" || code=$?
    if [ "$code" -eq 3 ]; then
        echo "$name was stopped and has saved; the same command resumes it" >&2
        exit 3
    elif [ "$code" -ne 0 ]; then
        echo "error: $name did not finish (exit code $code); see above or $OUT/logs/$name.log" >&2
        if [ "$code" -eq 2 ]; then
            echo "       correct the input first; the same command resumes it" >&2
        else
            echo "       the same command resumes it" >&2
        fi
        exit "$code"
    fi
}

train() {
    local COMMAND FLAGS layout
    phase_command "$1"
    read -ra layout <<< "${LAYOUT[$1]}"
    logged "$1" "$PYTHON" "${COMMAND[@]}" "${layout[@]}" --nproc-per-node "$NPROC"
}

say "Plan: $EXPERIMENT on $NPROC processes, $DEVICE"
plan_all
if [ -n "$DRY_RUN" ]; then
    exit 0
fi
mkdir -p "$OUT/logs" "$DATA"
trap 'echo "interrupted; the running stage saves first" >&2' INT

for stage in $STAGES; do
    case $stage in
    tokenizer)
        if [ -e "$DATA/domains.json" ] || [ -e "${TOKENIZER:?the experiment must set TOKENIZER}" ]; then
            continue
        fi
        say "Tokenizer"
        logged tokenizer "$PYTHON" tools/train_tokenizer.py --input "${TRAIN_FILES[@]}" \
            --vocab-size "${VOCAB_SIZE:?the experiment must set VOCAB_SIZE}" --output "$TOKENIZER"
        ;;
    preprocess)
        # A data set from elsewhere is used as it is.
        if [ -e "$DATA/domains.json" ] && [ ! -e "$DATA/unfinished" ]; then
            continue
        fi
        say "Data"
        touch "$DATA/unfinished"
        # Without files for evaluation, the tool holds out a part of the text.
        splits=(train valid)
        if [ "${#VALID_FILES[@]}" -eq 0 ]; then
            splits=("")
        fi
        for split in "${splits[@]}"; do
            preprocess_flags "$split"
            files=("${TRAIN_FILES[@]}")
            if [ "$split" = valid ]; then
                files=("${VALID_FILES[@]}")
            fi
            logged preprocess "$PYTHON" tools/preprocess_data.py --input "${files[@]}" --workers "$cores" --resume \
                "${FLAGS[@]}"
        done
        rm "$DATA/unfinished"
        say "Plan"
        plan_all
        ;;
    report)
        say "Report"
        logged report "$PYTHON" tools/report.py "$OUT/reference" "$OUT/proxy" "$OUT/main" --output-dir "$OUT/report"
        ;;
    *)
        say "${stage^}"
        [ -n "${LAYOUT[$stage]:-}" ] || fail "$DATA/domains.json is missing; add preprocess to STAGES, or set DATA"
        train "$stage"
        ;;
    esac
done
say "Done. Results are in $OUT, logs in $OUT/logs"
