# shellcheck shell=bash
# Sourced by slurm/common.sh and workstation/run_all.sh: the flags of each stage of an EXPERIMENT file. The functions named
# *_flags set the array FLAGS.

# stage_flags STAGE: flags of pretrain_doremi.py for a phase, without --phase and --domains. The proxy reads the losses
# in OUT/scores, or with REFERENCE_SOURCE=online it runs the reference on each batch, or with REFERENCE_SOURCE=none it has
# none. REFERENCE_OUT is another folder for reference and scores, REFERENCE_WEIGHTS and MAIN_WEIGHTS are other weights for
# the reference and the main model, RUN_SEED is another seed.
stage_flags() {
    local shared=${REFERENCE_OUT:-$OUT}
    case $1 in
    reference)
        FLAGS=(--save "$shared/reference" --load "$shared/reference" "${TRAINING[@]}" "${SMALL_MODEL[@]}" "${REFERENCE[@]}"
            ${REFERENCE_WEIGHTS:+--domain-weights "$REFERENCE_WEIGHTS"})
        ;;
    score)
        : "${SCORE[@]?EXPERIMENT must set SCORE, the flags for data, precision and layout (see examples/pile/pile.sh)}"
        FLAGS=(--save "$shared/scores" --reference-load "$shared/reference" "${SCORE[@]}")
        # In a dry run the reference may not be trained yet, so its shape is given.
        if [ -n "${DRY_RUN:-}" ]; then
            FLAGS+=("${SMALL_MODEL[@]}")
        fi
        ;;
    proxy)
        FLAGS=(--save "$OUT/proxy" --load "$OUT/proxy" "${TRAINING[@]}" "${SMALL_MODEL[@]}" "${PROXY[@]}")
        case ${REFERENCE_SOURCE:-scores} in
        online) FLAGS+=(--reference-load "$shared/reference") ;;
        none) ;;
        *) FLAGS+=(--reference-losses "$shared/scores") ;;
        esac
        ;;
    main)
        FLAGS=(--save "$OUT/main" --load "$OUT/main" "${TRAINING[@]}" "${MAIN_MODEL[@]}"
            --domain-weights "${MAIN_WEIGHTS:-$OUT/proxy/domain_weights.json}")
        ;;
    esac
    # The last value of a flag counts.
    FLAGS+=(${RUN_SEED:+--seed "$RUN_SEED"})
}

# with_final_paths: a filter for a plan that was made with OUT/to-come as OUT, where nothing exists: the stages before it
# are still to run. Its paths are those of the jobs.
with_final_paths() {
    # Lines of the plan are wrapped, so the words may be apart.
    sed -z -E -e 's#/to-come(/\S*)(\s+)does(\s+)not(\s+)exist(\s+)yet#\1\2is\3still\4to\5come#g' -e 's#/to-come/#/#g'
}

# preprocess_flags SPLIT: flags of tools/preprocess_data.py, without --input; with an empty SPLIT the tool holds out a part
# of the text. OPTIONS adds flags, quoted as in a shell,
# or as an array in an EXPERIMENT file.
preprocess_flags() {
    local options=() words
    if [[ $(declare -p OPTIONS 2> /dev/null || true) == "declare -a"* ]]; then
        options=("${OPTIONS[@]}")
    elif [ -n "${OPTIONS:-}" ]; then
        # xargs parses quotes and backslashes without executing anything but printf.
        words=$(xargs printf '%s\n' <<< "$OPTIONS" && echo end) || {
            echo "error: unclosed quote in OPTIONS: $OPTIONS" >&2
            exit 2
        }
        mapfile -t options <<< "$words"
        unset 'options[-1]'
    fi
    FLAGS=(--output-dir "$DATA" ${1:+--split "$1"} ${TOKENIZER_TYPE:+--tokenizer-type "$TOKENIZER_TYPE"}
        --tokenizer-model "${TOKENIZER:?set it to the tokenizer file}" --append-eod "${options[@]}")
}

# require_free_out EXPERIMENT: exits unless the experiment's OUT can be set from outside, as chains of experiments do.
require_free_out() {
    local out
    if [ ! -f "$1" ] || [ ! -r "$1" ]; then
        echo "error: $1 is missing: EXPERIMENT names the file of the run" >&2
        echo "       correct the path; it is relative to the root of the repository" >&2
        exit 2
    fi
    # shellcheck disable=SC2016  # expanded by that shell
    out=$(OUT=elsewhere bash -c 'source "$1" && echo "$OUT"' - "$1")
    if [ "$out" != elsewhere ]; then
        echo "error: $1 sets OUT=$out whatever the environment says, so every chain would write to that folder" >&2
        echo "       let it say OUT=\${OUT:-$out}" >&2
        exit 2
    fi
}
