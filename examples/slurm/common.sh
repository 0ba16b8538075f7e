# Sourced by the batch scripts, in the folder from which they were submitted: the repository's root.
#
# SITE names what differs between clusters (site.sh), EXPERIMENT what is trained (../pile/pile.sh). With DRY_RUN=N a
# training script does not train: it prints what one of N ranks would hold, checks flags and files, and needs no SLURM.

source "${SITE:-examples/slurm/site.sh}"
source "${EXPERIMENT:-examples/pile/pile.sh}"

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
    # Where the ranks meet. No node's name is known before, and no ssh is needed: srun starts one task a rank.
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
    # When the allocation ends; older SLURMs do not set it. Where squeue says no time, none is known: an empty date would
    # be read as last midnight.
    if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
        local end
        end=$(squeue --noheader --jobs="$job" --format=%e || true)
        if [[ $end == [0-9]*T* ]]; then
            SLURM_JOB_END_TIME=$(date --date="$end" +%s)
            export SLURM_JOB_END_TIME
        fi
    fi
    # No shell between srun and Python: signals reach Python itself. A rank that dies is named by the others, which end
    # by themselves; --wait is for those that cannot.
    srun --kill-on-bad-exit=0 --wait=120 --label "${command[@]}" || code=$?
    if [ "$code" -eq 3 ]; then
        echo "stopped before its end and saved: requeued"
        scontrol requeue "$job"
    fi
    exit "$code"
}
