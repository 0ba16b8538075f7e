# shellcheck shell=bash
# Sourced by the batch scripts in the root of the repository, from which they are submitted.
#
# SITE is the file of cluster settings (site.sh), EXPERIMENT the file of run settings (../pile/pile.sh). With DRY_RUN=N
# a training script does not train: it checks flags and files and prints the resolved plan for N ranks. It needs neither
# SLURM nor the earlier stages, only the data.

for file in "${SITE:-examples/slurm/site.sh}" "${EXPERIMENT:-examples/pile/pile.sh}"; do
    if [ ! -f "$file" ] || [ ! -r "$file" ]; then
        echo "error: $file is missing: SITE names the file of the cluster, EXPERIMENT that of the run" >&2
        echo "       correct the path; it is relative to the root of the repository" >&2
        exit 2
    fi
done
# shellcheck source=examples/slurm/site.sh
source "${SITE:-examples/slurm/site.sh}"
# shellcheck source=examples/pile/pile.sh
source "${EXPERIMENT:-examples/pile/pile.sh}"
# shellcheck source=examples/stages.sh
source examples/stages.sh

# matching PATTERN COMMAND...: prints the output lines of a command that match PATTERN in full, since the commands of
# some sites also print banners. Prints nothing if the command fails. Reads all of the output: a reader that exits early
# (head) would kill the command by SIGPIPE.
matching() {
    local pattern=$1 output
    shift
    output=$("$@") || return 0
    grep -E -x -- "$pattern" <<< "$output" || true
}

# job_number OUTPUT: prints the job ID in what `sbatch --parsable` printed: the ID, then a semicolon and the cluster if
# there are several; at some sites also a banner. Fails if there is none.
job_number() {
    local numbers
    numbers=$(grep -E -x '[0-9]+(;.*)?' <<< "$1") || return 1
    numbers=${numbers##*$'\n'}
    echo "${numbers%%;*}"
}

# end_of JOB: prints the time at which SLURM will end a job, in seconds since 1970; nothing if it is unknown. If there
# are several (arrays, heterogeneous jobs), the earliest counts.
end_of() {
    local ends
    ends=$(matching '[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]+' squeue --noheader --jobs="$1" --format=%e | sort)
    if [ -n "$ends" ]; then
        date --date="${ends%%$'\n'*}" +%s || true
    fi
}

# stopped_everywhere CODE FILE: succeeds if srun's exit CODE, the highest of all tasks, is 3, and no line of its errors
# in FILE reports a task with another code. If FILE reports no task at all (srun --quiet), CODE alone decides.
stopped_everywhere() {
    [ "$1" -eq 3 ] && awk '/: tasks? [0-9]/ && !/Exited with exit code 3$/ { others++ } END { exit others > 0 }' "$2"
}

# cluster_environment: exports what ranks on a cluster need, except where it is set already (site.sh, sbatch --export).
# The interface that NCCL uses (NCCL_SOCKET_IFNAME) is not among it: only the site knows its name. The program itself
# keeps NCCL's own watchdog from ending a run before --distributed-timeout-minutes.
cluster_environment() {
    # Since version 22.05 srun does not inherit --cpus-per-task from the job.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
    fi
    # A collective that times out leaves a record of the last 2,000 calls of each rank, for torchfrtrace.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Memory that was freed in pieces is joined again. PYTORCH_CUDA_ALLOC_CONF is the older name.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
    # On a disk of the node: ranks of all nodes would lock and read the same files of a shared one.
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${SLURM_TMPDIR:-/tmp}/torchinductor_$(id -un)}
}

# pretrain PHASE FLAGS...: runs a phase on all tasks of the job, and requeues the job if the run was stopped. The FLAGS
# are added to those of the experiment.
pretrain() {
    local phase=$1 code=0 FLAGS=()
    stage_flags "$phase"
    shift
    local command=("$PYTHON" pretrain_doremi.py --phase "$phase" --domains "$DATA/domains.json" "${FLAGS[@]}" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
        exec "${command[@]}" --dry-run --dry-run-world-size "$DRY_RUN"
    fi
    # One task of an array shares its job ID with the array, so that ID alone would name all tasks.
    local job=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    # The ranks meet on the first node. No ssh is needed: srun starts one task per rank. If scontrol fails, the program
    # uses the node that srun reports and a port derived from the IDs of the job and the step.
    if [ -z "${MASTER_ADDR:-}" ]; then
        local hosts
        hosts=$(matching '[A-Za-z0-9][A-Za-z0-9._-]*' scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    export MASTER_ADDR
    # Older versions of SLURM do not set the end time of the allocation.
    if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
        SLURM_JOB_END_TIME=$(end_of "$job")
        export SLURM_JOB_END_TIME
    fi
    cluster_environment
    local errors
    errors=$(mktemp)
    # There is no shell between srun and Python, so signals reach Python. If a rank dies, the others report it and exit
    # within about a minute; --wait ends those that cannot. srun's errors are kept for stopped_everywhere.
    {
        srun --kill-on-bad-exit=0 --wait=90 --label --cpu-bind="${CPU_BIND:-cores}" "${command[@]}" 2>&1 >&3 \
            | sed -u -n -e p -e "/^srun: error: /w $errors" >&2
    } 3>&1 || code=$?
    if stopped_everywhere "$code" "$errors"; then
        echo "the run was stopped and has saved: requesting a requeue"
        # A requeue also terminates this script.
        trap '' TERM
        if scontrol requeue "$job"; then
            echo "requeued"
        else
            echo "error: scontrol requeue $job failed; submit the job again to resume" >&2
        fi
    elif [ "$code" -eq 3 ]; then
        echo "error: some tasks were stopped and others failed (see above); not requeued" >&2
        code=1
    fi
    rm -f "$errors"
    exit "$code"
}
