#!/usr/bin/env bash
# The paper's ablation of the objective (Xie et al. 2023, Table 7): the proxy's excess loss over the reference, its loss
# alone (hardest) and minus the reference's loss (easiest), with one reference; each decides the mixture of a main model
# of the proxy's size; and a main model on the natural mixture.
#
#     DRY_RUN=1 bash examples/pile/objectives.sh       # checks every chain, submits nothing
#     bash examples/pile/objectives.sh
#
# The data must exist, and so must the recorded losses of the reference before the chains start:
#
#     OUT=runs/pile-objectives/shared STAGES="reference score" bash examples/slurm/run_all.sh examples/pile/pile.sh
#
# Environment variables: SIZE=280m of all models, OUT=runs/pile-objectives, and those of sizes.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-runs/pile-objectives}
SIZE=${SIZE:-280m}
# shellcheck source=examples/pile/study.sh
source examples/pile/study.sh

export SMALL_SIZE=$SIZE MAIN_SIZE=$SIZE REFERENCE_OUT=$OUT/shared
chain natural main MAIN_WEIGHTS=natural
for objective in excess easiest; do
    chain "$objective" "proxy main" OBJECTIVE="$objective"
done
# The proxy's loss alone needs no reference.
chain hardest "proxy main" OBJECTIVE=hardest REFERENCE_SOURCE=none
finish excess hardest easiest
