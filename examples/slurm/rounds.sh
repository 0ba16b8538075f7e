#!/usr/bin/env bash
# Submits rounds of DoReMi: the weights that a round learns are the sampling weights of the next round's reference, until
# they stop moving (docs/rounds.md). Each stage is a job; the last job of a round judges it and submits the next round.
#
#     export SITE=my_site.sh SBATCH_ACCOUNT=... SBATCH_PARTITION=...
#     bash examples/slurm/rounds.sh examples/pile/pile.sh
#
# After a job has failed, run it again: finished stages are skipped and the failed one resumes. With DRY_RUN=1 it checks
# the round as run_all.sh does, and submits and writes nothing. Environment variables:
#
#     ROUNDS_OUT=OUT/rounds    folder of the rounds: ROUNDS_OUT/rounds.json, ROUNDS_OUT/domain_weights.json
#     SEEDS=1                  references and proxies of a round, each pair with a seed of its own: FIRST_SEED=1234 and
#                              those after it; with SEEDS=1 the seed is the experiment's
#     MAX_ROUNDS=10            rounds at most
#     MIN_CHANGE=1e-3          a change of a weight that never counts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export EXPERIMENT=${1:?"give the experiment, such as examples/pile/pile.sh"}
source examples/slurm/common.sh
require_free_out "$EXPERIMENT"
export ROUNDS_OUT=${ROUNDS_OUT:-$OUT/rounds}
export SEEDS=${SEEDS:-1} MAX_ROUNDS=${MAX_ROUNDS:-10} MIN_CHANGE=${MIN_CHANGE:-1e-3}
export FIRST_SEED=${FIRST_SEED:-1234}
for name in SEEDS MAX_ROUNDS FIRST_SEED; do
    if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: $name=${!name}: give a whole number of 1 or more" >&2
        exit 2
    fi
done

# After a round, or by another rule than the one by which the rounds have ended.
if [ "${2:-}" = judge ] || [ -e "$ROUNDS_OUT/domain_weights.json" ]; then
    "$PYTHON" tools/doremi_rounds.py --judge --save "$ROUNDS_OUT" --seeds "$SEEDS" --max-rounds "$MAX_ROUNDS" \
        --min-change "$MIN_CHANGE"
    if [ -e "$ROUNDS_OUT/domain_weights.json" ]; then
        echo "the rounds have ended: --domain-weights $ROUNDS_OUT/domain_weights.json"
        exit 0
    fi
fi
round=1
while [ -e "$ROUNDS_OUT/round-$((round + 1))/reference_weights.json" ]; do
    round=$((round + 1))
done
weights=
if [ "$round" -gt 1 ]; then
    weights=$ROUNDS_OUT/round-$round/reference_weights.json
fi
stages="reference score proxy"
if [ "${REFERENCE_SOURCE:-scores}" = online ]; then
    stages="reference proxy"
fi

proxies=()
for seed in $(seq 1 "$SEEDS"); do
    printf '== round %s, seed %s of %s\n' "$round" "$seed" "$SEEDS"
    run_seed=
    if [ "$SEEDS" -gt 1 ]; then
        run_seed=$((FIRST_SEED + seed - 1))
    fi
    output=$(env OUT="$ROUNDS_OUT/round-$round/seed-$seed" STAGES="$stages" REFERENCE_WEIGHTS="$weights" \
        RUN_SEED="$run_seed" bash examples/slurm/run_all.sh "$EXPERIMENT") || {
        code=$?
        echo "$output"
        if [ "${#proxies[@]}" -gt 0 ]; then
            echo "error: seed $seed was not submitted; the jobs of the seeds before it are in the queue" >&2
        fi
        exit "$code"
    }
    grep -v -e '^after the last one' <<< "$output"
    proxies+=("$(sed -n 's/^proxy: job //p' <<< "$output")")
done
if [ -n "${DRY_RUN:-}" ]; then
    exit 0
fi
dependency=$(IFS=: && echo "${proxies[*]}")
submitted=$(sbatch --parsable "${CPU_JOB[@]}" --cpus-per-task=1 --dependency="afterok:$dependency" \
    --kill-on-invalid-dep=yes --export=ALL --output="$ROUNDS_OUT/round-$round/judge-%j.log" \
    examples/slurm/judge.sbatch) || submitted=
job=$(job_number "$submitted") || {
    echo "error: sbatch refused the job that judges the round; in the queue are proxies ${proxies[*]}" >&2
    echo "       after they have ended, run the same command again" >&2
    exit 1
}
echo "judge: job $job"
echo "it judges round $round and submits the next round, or writes $ROUNDS_OUT/domain_weights.json"
