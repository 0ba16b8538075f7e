# shellcheck shell=bash
# Sourced by the batch scripts, in the folder from which they were submitted: the repository's root.
#
# SITE names what differs between clusters (site.sh), EXPERIMENT what is trained (../pile/pile.sh). With DRY_RUN=N a
# training script does not train: it prints the run as resolved for N ranks and checks flags and files. It needs no SLURM
# and no earlier stage; only the data must exist.

# shellcheck source=examples/slurm/site.sh
source "${SITE:-examples/slurm/site.sh}"
# shellcheck source=examples/pile/pile.sh
source "${EXPERIMENT:-examples/pile/pile.sh}"

# matching PATTERN COMMAND...: the lines of a command's output that match all of PATTERN. Some sites' commands print
# banners too. All of the output is read: a reader that leaves early (head) ends the command by SIGPIPE. Empty where the
# command fails.
matching() {
    local pattern=$1 output
    shift
    output=$("$@") || return 0
    grep -E -x -- "$pattern" <<< "$output" || true
}

# end_of JOB: when SLURM will end a job, in seconds since 1970; empty where it does not say. Of several lines (arrays,
# heterogeneous jobs) the earliest counts.
end_of() {
    local ends
    ends=$(matching '[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]+' squeue --noheader --jobs="$1" --format=%e | sort)
    if [ -n "$ends" ]; then
        date --date="${ends%%$'\n'*}" +%s || true
    fi
}

# stopped_everywhere CODE FILE: whether srun exited with 3 (the highest exit code of all tasks) and no line of its errors
# in FILE names a task that ended otherwise. Where FILE names no task (srun --quiet), srun's own CODE decides.
# All of FILE is read: a reader that leaves early ends the one before it in a pipe by SIGPIPE.
stopped_everywhere() {
    [ "$1" -eq 3 ] && awk '/: tasks? [0-9]/ && !/Exited with exit code 3$/ { others++ } END { exit others > 0 }' "$2"
}

# pretrain PHASE SAVE FLAGS...: runs a phase on all tasks of the job; requeues the job where the run was stopped.
pretrain() {
    local phase=$1 save=$2 code=0
    shift 2
    local command=("$PYTHON" pretrain_doremi.py --phase "$phase" --domains "$DATA/domains.json" --save "$save" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        RANK=0 WORLD_SIZE=$DRY_RUN MASTER_ADDR=localhost exec "${command[@]}" --dry-run
    fi
    # One task of an array has the array's own number for its job, which names all of them.
    local job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    # Where the ranks meet: the first node. No ssh is needed, for srun starts one task a rank. Where scontrol does not
    # answer, the program takes the node that srun names, and a port made of the job's and the step's number.
    if [ -z "${MASTER_ADDR:-}" ]; then
        local hosts
        hosts=$(matching '[A-Za-z0-9][A-Za-z0-9._-]*' scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    export MASTER_ADDR
    # When the allocation ends; older SLURMs do not set it.
    if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
        SLURM_JOB_END_TIME=$(end_of "$job")
        export SLURM_JOB_END_TIME
    fi
    # Since 22.05 srun does not take the job's --cpus-per-task by itself.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    local errors
    errors=$(mktemp)
    # No shell between srun and Python: signals reach Python itself. A rank that dies is named by the others, which end
    # by themselves within about a minute; --wait is for those that cannot. What srun says of its tasks is kept.
    {
        srun --kill-on-bad-exit=0 --wait=90 --label --cpu-bind="${CPU_BIND:-cores}" "${command[@]}" 2>&1 >&3 \
            | sed -u -n -e p -e "/^srun: error: /w $errors" >&2
    } 3>&1 || code=$?
    if stopped_everywhere "$code" "$errors"; then
        echo "stopped before its end and saved: asking for a requeue"
        # A requeue ends this script too.
        trap '' TERM
        if scontrol requeue "$job"; then
            echo "requeued"
        else
            echo "error: scontrol requeue $job failed: submit the job again to resume" >&2
        fi
    elif [ "$code" -eq 3 ]; then
        echo "error: some tasks were stopped and others failed: not requeued; see above" >&2
        code=1
    fi
    rm -f "$errors"
    exit "$code"
}
