# shellcheck shell=bash disable=SC2034  # read by the scripts that source it
# The paper's chain (pile.sh: 280M reference and proxy, 8B main model, 200,000 steps) on GPUS H100s of 80 GB: 8, 64 or 512,
# all of them for every stage.
#
#     DRY_RUN=1 GPUS=64 bash examples/slurm/run_all.sh examples/pile/h100.sh     # plans each stage, submits nothing
#     GPUS=64 bash examples/slurm/run_all.sh examples/pile/h100.sh
#
# The dry run refuses a stage that does not fit into 85 % of a GPU, and prints time and communication; it plans without
# data as well. docs/planning.md has what it says, and why these layouts. With REFERENCE_SOURCE=online and
# STAGES="reference proxy main" the proxy runs the reference on each batch, and nothing is recorded. Other variables are
# those of pile.sh; the site file gives times.
GPUS=${GPUS:-64}
# shellcheck source=examples/pile/pile.sh
source examples/pile/pile.sh

# The main model has no pipeline: its last stage would have the output layer, a tenth of all arithmetic, beside its blocks.
case $GPUS in
8) small_windows=16 tensor=2 ;;
64) small_windows=8 tensor=2 ;;
# One window a GPU in a step.
512) small_windows=1 tensor=4 ;;
*)
    echo "error: GPUS=$GPUS: examples/pile/h100.sh has layouts for 8, 64 and 512 GPUs" >&2
    echo "       for another number, pretrain_doremi.py --dry-run --suggest-layout ranks those that fit" >&2
    exit 2
    ;;
esac
SMALL_MODEL=(--model-size "${SMALL_SIZE:-280m}" --micro-batch-size "$small_windows")
SCORE=("${WINDOWS[@]}" --micro-batch-size "$small_windows")
MAIN_MODEL=(--model-size 8b --micro-batch-size 4 --tensor-model-parallel-size "$tensor" --sequence-parallel)
if [ "${MAIN_SIZE:-8b}" != 8b ]; then
    MAIN_MODEL=(--model-size "$MAIN_SIZE" --micro-batch-size "$small_windows")
fi
# One H100 takes 0.78 of the time for a step of 1b, and half of it for a 280m proxy (docs/gpu.md).
TRAINING+=(--compile)
# The last value of an option counts.
SMALL_JOB+=(--nodes=$((GPUS / 8)) --ntasks-per-node=8 --gpus-per-node=8)
MAIN_JOB=("${SMALL_JOB[@]}")
if [ -n "${DRY_RUN:-}" ]; then
    TRAINING+=(--device-memory-gib 80)
    SCORE+=(--device-memory-gib 80)
    # A plan on a laptop, without The Pile: the paper's vocabulary.
    if [ ! -e "$DATA/domains.json" ]; then
        TRAINING+=(--vocab-size 256000)
        SCORE+=(--vocab-size 256000)
    fi
fi
