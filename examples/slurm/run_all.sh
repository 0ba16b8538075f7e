#!/usr/bin/env bash
# Submits the whole of DoReMi: each job waits for the one before it.
#
#     export SITE=my_site.sh SBATCH_ACCOUNT=... SBATCH_PARTITION=...
#     bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# Run again after a job failed, it resumes that job; finished stages are skipped. STAGES submits only some stages:
#     STAGES="proxy main" bash examples/slurm/run_all.sh examples/pile/pile.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export EXPERIMENT=${1:?"give the experiment, such as examples/pile/pile.sh"}
STAGES=${STAGES:-preprocess reference score proxy main}
source examples/slurm/common.sh
mkdir -p "$OUT/logs"

# First of all: a name that is wrong must not be found after others were submitted.
for stage in $STAGES; do
    case $stage in
    preprocess | reference | score | proxy | main) ;;
    *)
        echo "error: STAGES holds '$stage'; there are preprocess, reference, score, proxy, main; nothing was submitted" >&2
        exit 2
        ;;
    esac
done

previous=
submitted=()
# failed MESSAGE: says what is in the queue already, and how to take it out.
failed() {
    echo "error: $1" >&2
    if [ "${#submitted[@]}" -gt 0 ]; then
        echo "these jobs were submitted before and wait: ${submitted[*]}; to cancel them: scancel ${submitted[*]}" >&2
    fi
    exit 1
}
# submit NAME SBATCH-OPTIONS... -- ARGUMENTS...: submits NAME.sbatch after the job before it.
submit() {
    local name=$1 options=() output numbers
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    # Once a job has failed, those that wait for it leave the queue too.
    options+=(${previous:+"--dependency=afterok:$previous"} --kill-on-invalid-dep=yes --export=ALL)
    output=$(sbatch --parsable "${options[@]}" --output="$OUT/logs/%x-%j.log" "examples/slurm/$name.sbatch" "$@") \
        || failed "sbatch refused $name $*"
    # The number, with the cluster's name after a semicolon; some sites' sbatch prints more.
    numbers=$(grep -E -x '[0-9]+(;.*)?' <<< "$output") || failed "sbatch named no job for $name: $output"
    previous=${numbers##*$'\n'}
    previous=${previous%%;*}
    submitted+=("$previous")
    echo "$name $*: job $previous"
}

for stage in $STAGES; do
    case $stage in
    preprocess)
        for split in train valid; do
            declare -n files="${split^^}_FILES"
            submit preprocess "${CPU_JOB[@]}" --array="0-$((PREPROCESS_TASKS - 1))" -- "$split" "${files[@]}"
            submit merge "${CPU_JOB[@]}" -- "$split"
        done
        ;;
    score) submit score "${SMALL_JOB[@]}" "${SIGNAL[@]}" --array="0-$((SCORE_TASKS - 1))" -- ;;
    reference | proxy) submit "$stage" "${SMALL_JOB[@]}" "${SIGNAL[@]}" -- ;;
    main) submit main "${MAIN_JOB[@]}" "${SIGNAL[@]}" -- ;;
    esac
done
echo "squeue --me shows them; logs are in $OUT/logs. At the end: $PYTHON tools/report.py $OUT/proxy $OUT/main"
