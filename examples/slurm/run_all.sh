#!/usr/bin/env bash
# Submits all stages of DoReMi; each job waits for the one before it.
#
#     export SITE=my_site.sh SBATCH_ACCOUNT=... SBATCH_PARTITION=...
#     bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# After a job has failed, run it again: finished stages are skipped and the failed one resumes. STAGES selects stages:
#     STAGES="proxy main" bash examples/slurm/run_all.sh examples/pile/pile.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export EXPERIMENT=${1:?"give the experiment, such as examples/pile/pile.sh"}
STAGES=${STAGES:-preprocess reference score proxy main}
source examples/slurm/common.sh
mkdir -p "$OUT/logs"

# Check all names before submitting anything.
for stage in $STAGES; do
    case $stage in
    preprocess | reference | score | proxy | main) ;;
    *)
        echo "error: unknown stage '$stage' in STAGES; nothing was submitted" >&2
        echo "       the stages are preprocess, reference, score, proxy, main" >&2
        exit 2
        ;;
    esac
done

previous=
submitted=()
# failed MESSAGE: prints the error, the jobs that are already in the queue and how to cancel them, then exits.
failed() {
    echo "error: $1" >&2
    if [ "${#submitted[@]}" -gt 0 ]; then
        echo "these jobs are already in the queue; to cancel them: scancel ${submitted[*]}" >&2
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
    # If a job fails, SLURM removes the jobs that depend on it from the queue.
    options+=(${previous:+"--dependency=afterok:$previous"} --kill-on-invalid-dep=yes --export=ALL)
    output=$(sbatch --parsable "${options[@]}" --output="$OUT/logs/%x-%j.log" "examples/slurm/$name.sbatch" "$@") \
        || failed "sbatch refused $name $*"
    # sbatch prints the job ID, then a semicolon and the cluster if there are several. At some sites it prints more.
    numbers=$(grep -E -x '[0-9]+(;.*)?' <<< "$output") || failed "sbatch printed no job ID for $name: $output"
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
echo "squeue --me lists these jobs; their logs are in $OUT/logs"
echo "after the last one: $PYTHON tools/report.py $OUT/proxy $OUT/main"
