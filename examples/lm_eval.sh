#!/usr/bin/env bash
# Evaluates a run, or a Hugging Face folder, with EleutherAI's lm-evaluation-harness.
#
#     bash examples/lm_eval.sh runs/main                                       # the paper's five tasks, one example each
#     TASKS=heldout DOMAINS=data/domains.json bash examples/lm_eval.sh runs/main    # needs no network
#
# Environment variables:
#
#     TASKS=triviaqa,nq_open    tasks of the harness; default: those of Xie et al. 2023, section 3.1, whose data sets are
#                               downloaded. `heldout` are held-out documents of DOMAINS, in bits per byte;
#                               `heldout_NAME` those of one domain
#     SHOTS=1                   examples in front of a question; default: 1, and 0 for heldout
#     DOCUMENTS=100             held-out documents of each domain
#     OUT=runs/lm_eval          results, exported model and tasks
#     DEVICE=cuda BATCH_SIZE=8 LIMIT=100    as for lm_eval
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -eq 1 ] || fail "usage: bash examples/lm_eval.sh RUN_OR_HUGGING_FACE_FOLDER"
MODEL=$1
TASKS=${TASKS:-triviaqa,nq_open,webqs,squadv2,lambada_openai}
OUT=${OUT:-runs/lm_eval}
[ -f "$MODEL/config.json" ] || [ -f "${MODEL%@*}/config.json" ] || fail "$MODEL holds no config.json: give a run or a Hugging Face folder"
[[ $TASKS != heldout* || -f ${DOMAINS:-} ]] || fail "TASKS=$TASKS: set DOMAINS to the manifest, domains.json"
# shellcheck source=examples/environment.sh
source "$root/examples/environment.sh"
use_environment requirements-eval.txt

if [ -f "$MODEL/config.json" ] && grep -q '"model_type"' "$MODEL/config.json" && ! grep -q '"megatron-doremi' "$MODEL/config.json"; then
    folder=$MODEL
else
    # A folder that only this script writes, and may replace.
    folder=$OUT/exported-for-lm-eval
    rm -rf "$folder"
    mkdir -p "$OUT"
    "$PYTHON" "$root/tools/convert_checkpoint.py" --to hf "$MODEL" "$folder"
fi
options=()
if [[ $TASKS == heldout* ]]; then
    "$PYTHON" "$root/tools/eval_task.py" --domains "$DOMAINS" \
        --documents "${DOCUMENTS:-100}" --output-dir "$OUT/task"
    options+=(--include_path "$OUT/task" --num_fewshot 0)
    # Nothing is looked for in a network.
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
else
    options+=(--num_fewshot "${SHOTS:-1}")
fi
# As JSON: a path may hold commas, or look like a number.
arguments=$("$PYTHON" -c 'import json, sys; print(json.dumps({"pretrained": sys.argv[1]}))' "$folder")
"$PYTHON" -m lm_eval run --model hf --model_args "$arguments" --tasks "$TASKS" "${options[@]}" \
    --batch_size "${BATCH_SIZE:-8}" ${DEVICE:+--device "$DEVICE"} ${LIMIT:+--limit "$LIMIT"} \
    --output_path "$OUT/results" --log_samples
