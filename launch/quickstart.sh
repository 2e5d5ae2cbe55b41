#!/usr/bin/env bash
# Trains a small MoE++ model on real text, from nothing:
#
#   ./launch/quickstart.sh [section.key=value ...]
#
# An earlier run is moved aside, not deleted; with --resume among the arguments it is resumed. Makes the environment if needed, prepares the running Python's library sources as a corpus,
# trains on the devices here (two CPU ranks where there is no GPU), writes the report, samples text.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# shellcheck source=launch/ranks.sh
source "$MOEPP_ROOT/launch/ranks.sh"

# The command that resumes an interrupted run says how to get from here to there.
export MOEPP_SHELL_FOLDER=$PWD
cd -- "$MOEPP_ROOT"
run=runs/quickstart
again=(--overwrite)
for argument in "$@"; do
    if [[ $argument == run.dir=* ]]; then run=${argument#run.dir=}; fi
    if [[ $argument == --resume || $argument == --overwrite ]]; then again=(); fi
done

devices=(--nproc 2)
gpus=$(moepp_gpus)
if [[ $gpus == 1 ]]; then
    # Two ranks cannot share one GPU under NCCL.
    devices=(--nproc 1 parallel.expert_model_parallel_size=1)
fi

# The manifest is written last: with it the corpus is whole.
if [[ -e data/stdlib/manifest.json ]]; then
    echo "corpus: data/stdlib is there already (remove it to prepare it anew)"
else
    "$MOEPP_BIN/moepp" data prepare stdlib --out data/stdlib --vocab-size 4096
fi
"$MOEPP_BIN/moepp" train configs/quickstart.yaml "${devices[@]}" "${again[@]}" "$@"
"$MOEPP_BIN/moepp" report "$run"

printf '\nA sample from the trained model:\n'
"$MOEPP_BIN/moepp" generate "$run" --prompt 'def '
run=$(realpath -m -- "$run")
printf '\nreport      %s\ncheckpoint  %s\nmetrics     %s\n' \
    "$run/report.html" "$run/checkpoints" "$run/metrics.jsonl"
# So that `moepp` is found.
if [[ -e $MOEPP_BIN/activate ]]; then printf 'next        source %q, then moepp --help\n' "$MOEPP_BIN/activate"; fi
