#!/usr/bin/env bash
# Submits all stages of DoReMi; each job waits for the one before it.
#
#     export SITE=my_site.sh SBATCH_ACCOUNT=... SBATCH_PARTITION=...
#     bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# After a job has failed, run it again: finished stages are skipped and the failed one resumes. STAGES selects stages:
#     STAGES="proxy main" bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# With DRY_RUN=1 it submits and writes nothing: it checks the input files, the plan of every stage on the ranks that its
# job requests and, where there is an sbatch, the options of every job. It exits with 2 if a check has failed.
#     DRY_RUN=1 bash examples/slurm/run_all.sh examples/pile/pile.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export EXPERIMENT=${1:?"give the experiment, such as examples/pile/pile.sh"}
STAGES=${STAGES:-preprocess reference score proxy main}
source examples/slurm/common.sh

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

if [[ " $STAGES " == *" preprocess "* ]] && { [ -z "${TRAIN_FILES[*]:+1}" ] || [ -z "${VALID_FILES[*]:+1}" ]; }; then
    echo "error: the stage preprocess takes TRAIN_FILES and VALID_FILES, and $EXPERIMENT does not set both" >&2
    echo "       set both, or run tools/preprocess_data.py, which can hold out a part, and leave preprocess out of STAGES" >&2
    exit 2
fi

# tasks_of OPTIONS...: prints the number of tasks that options of sbatch request.
tasks_of() {
    local nodes=1 tasks="" per_node=1
    while [ $# -gt 0 ]; do
        case $1 in
        --nodes=* | --ntasks=* | --ntasks-per-node=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
        -N | --nodes) nodes=$2 ;;
        -n | --ntasks) tasks=$2 ;;
        --ntasks-per-node) per_node=$2 ;;
        esac
        shift
    done
    echo "${tasks:-$((nodes * per_node))}"
}

# The checks of DRY_RUN: each prints what is fine, or a fault, which it counts. What no stage of STAGES makes is awaited.
faults=0
awaited=()
gpu_hours=()
fault() {
    echo "error: $1" >&2
    faults=$((faults + 1))
}
# check_files SPLIT: the text and the tokenizer of preprocessing.
check_files() {
    local file missing=0
    declare -n files="${1^^}_FILES"
    for file in "${files[@]}" "${TOKENIZER:-}"; do
        if [ ! -r "$file" ]; then
            fault "preprocess $1: cannot read '$file'"
            missing=1
        fi
    done
    [ "$missing" -ne 0 ] || echo "preprocess $1: ${#files[@]} files and the tokenizer can be read"
}
# check_plan STAGE EARLIER RANKS: the plan of a stage. If the stage EARLIER is one of STAGES, its results count as still
# to come. Before the data exist, only the flags are checked: the manifest is then the one fault.
check_plan() {
    local plan hours code=0 out=$OUT
    [[ " $STAGES " != *" ${2:-none} "* ]] || out=$OUT/to-come
    plan=$(DRY_RUN=$3 OUT=$out SLURM_SUBMIT_DIR=. SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT="$SCORE_TASKS" \
        bash "examples/slurm/$1.sbatch" 2>&1) || code=$?
    if [ "$code" -eq 0 ]; then
        printf '%s, %s ranks:\n%s\n' "$1" "$3" "$(sed -n '/^layout/,$s/^/  /p' <<< "$plan" | with_final_paths)"
        hours=$(sed -n 's/.* \([0-9,.]*\) GPU-hours$/\1/p' <<< "$plan" | tr -d ,)
        [ -z "$hours" ] || gpu_hours+=("$1 $hours")
        # Lines of the plan are wrapped.
        plan=$(sed -e ':all' -e 'N' -e '$!b all' -e 's/\n  */ /g' <<< "$plan")
        if [[ $out == "$OUT" && $plan =~ (--[a-z-]+ [^:$'\n']+)" does not exist yet" ]]; then
            awaited+=("$1: ${BASH_REMATCH[1]}")
        fi
    elif [ ! -e "$DATA/domains.json" ] && [[ $plan == *"error: 1 fault in the input:"*"domains.json"* ]]; then
        echo "$1, $3 ranks: the flags are valid; $DATA/domains.json does not exist yet, so nothing else is known"
    else
        fault "$1, $3 ranks: $plan"
    fi
}
# check_job NAME SBATCH-OPTIONS... -- ARGUMENTS...: whether SLURM would accept a job.
check_job() {
    local name=$1 options=() output
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    command -v sbatch > /dev/null || return 0
    if output=$(sbatch --test-only "${options[@]}" "examples/slurm/$name.sbatch" "${@:2}" 2>&1); then
        echo "job $name ${options[*]}: accepted"
    else
        fault "job $name ${options[*]}: $output"
    fi
}
check_all() {
    local stage split
    "$PYTHON" pretrain_doremi.py --version || fault "PYTHON=$PYTHON cannot run pretrain_doremi.py"
    command -v sbatch > /dev/null || echo "no sbatch on this machine: the options of the jobs are not checked"
    for stage in $STAGES; do
        case $stage in
        preprocess)
            for split in train valid; do
                check_files "$split"
            done
            check_job preprocess "${CPU_JOB[@]}" --array="0-$((PREPROCESS_TASKS - 1))" -- train
            check_job merge "${CPU_JOB[@]}" -- train
            ;;
        reference) check_plan reference "" "$(tasks_of "${SMALL_JOB[@]}")" ;;
        score) check_plan score reference "$(tasks_of "${SMALL_JOB[@]}")" ;;
        proxy)
            if [ "${REFERENCE_SOURCE:-scores}" = online ]; then
                check_plan proxy reference "$(tasks_of "${SMALL_JOB[@]}")"
            else
                check_plan proxy score "$(tasks_of "${SMALL_JOB[@]}")"
            fi
            ;;
        main) check_plan main proxy "$(tasks_of "${MAIN_JOB[@]}")" ;;
        esac
        case $stage in
        score) check_job score "${SMALL_JOB[@]}" "${SIGNAL[@]}" --array="0-$((SCORE_TASKS - 1))" -- ;;
        reference | proxy) check_job "$stage" "${SMALL_JOB[@]}" "${SIGNAL[@]}" -- ;;
        main) check_job main "${MAIN_JOB[@]}" "${SIGNAL[@]}" -- ;;
        esac
    done
    if [ "$faults" -gt 0 ]; then
        echo "error: $faults of the checks failed; nothing was submitted" >&2
        exit 2
    fi
    if [ "${#gpu_hours[@]}" -gt 1 ]; then
        printf '%s\n' "${gpu_hours[@]}" | awk '
            { total += $2; main += $1 == "main" ? $2 : 0 }
            END {
                printf "GPU-hours of these stages at the stated utilization: %.1f", total
                if (main > 0) printf "; those before main are %.1f %% of main", 100 * (total - main) / main
                print ""
            }'
    fi
    if [ "${#awaited[@]}" -gt 0 ]; then
        echo "these must exist before the jobs start, and no stage of STAGES makes them:"
        printf '  %s\n' "${awaited[@]}"
    fi
    echo "all checks passed; nothing was submitted"
}
if [ -n "${DRY_RUN:-}" ]; then
    check_all
    exit 0
fi

mkdir -p "$OUT/logs"
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
    local name=$1 options=() output
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
    previous=$(job_number "$output") || failed "sbatch printed no job ID for $name: $output"
    submitted+=("$previous")
    echo "$name${*:+ $*}: job $previous"
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
