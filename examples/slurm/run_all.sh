#!/usr/bin/env bash
# Submits the whole of DoReMi: each job waits for the one before it.
#
#     export SITE=my_site.sh SBATCH_ACCOUNT=... SBATCH_PARTITION=...
#     bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# Given again after a job failed, it goes on where that was: what is complete does nothing. STAGES submits some only:
#     STAGES="proxy main" bash examples/slurm/run_all.sh examples/pile/pile.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export EXPERIMENT=${1:?"give the experiment, such as examples/pile/pile.sh"}
STAGES=${STAGES:-preprocess reference score proxy main}
source examples/slurm/common.sh
mkdir -p "$OUT/logs"

previous=
# submit NAME SBATCH-OPTIONS... -- ARGUMENTS...: submits NAME.sbatch after the job before it.
submit() {
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    # Once a job has failed, those that wait for it leave the queue too.
    options+=(${previous:+"--dependency=afterok:$previous"} --kill-on-invalid-dep=yes --export=ALL)
    previous=$(sbatch --parsable "${options[@]}" --output="$OUT/logs/%x-%j.log" "examples/slurm/$name.sbatch" "$@")
    previous=${previous%%;*}
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
    *)
        echo "error: STAGES holds '$stage'; there are preprocess, reference, score, proxy, main" >&2
        exit 2
        ;;
    esac
done
echo "squeue --me shows them; logs are in $OUT/logs. At the end: $PYTHON tools/report.py $OUT/proxy $OUT/main"
