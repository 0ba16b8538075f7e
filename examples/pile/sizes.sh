#!/usr/bin/env bash
# The paper's comparison of proxies by size (Xie et al. 2023, section 3.2): for each size a reference and a proxy of that
# size, and one 8B main model on the weights that it learned; and a main model on the natural mixture.
#
#     DRY_RUN=1 bash examples/pile/sizes.sh       # checks every chain, submits nothing
#     bash examples/pile/sizes.sh
#
# The data must exist (STAGES=preprocess bash examples/slurm/run_all.sh examples/pile/pile.sh). Environment variables:
#
#     SIZES="70m 150m 280m 1b"    sizes of the proxies
#     OUT=runs/pile-sizes         folder of the results: OUT/SIZE/proxy/domain_weights.json, OUT/SIZE/main
#     EXPERIMENT, SITE            as for run_all.sh; RUN_ALL=examples/workstation/run_all.sh for the GPUs of this machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-runs/pile-sizes}
SIZES=${SIZES:-70m 150m 280m 1b}
# shellcheck source=examples/pile/study.sh
source examples/pile/study.sh
# shellcheck disable=SC2086  # words
require_names SIZES $SIZES

chain natural main MAIN_WEIGHTS=natural
for size in $SIZES; do
    chain "$size" "reference score proxy main" SMALL_SIZE="$size"
done
# shellcheck disable=SC2086  # words
finish $SIZES
