#!/usr/bin/env bash
# Makes the environment if needed, then runs the tests:  ./launch/test.sh [pytest args]
# Without a -m of your own the default selection runs: no layout matrix, nothing slow. Tests that need
# a GPU are a session of their own, tests/gpu: the second one here, where there is a GPU and nothing is
# asked for. Paths are relative to the repository.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

cd -- "$MOEPP_ROOT"
# pytest's exit status is ours, 5 (nothing collected) included; a later -m replaces this one.
tests=("$MOEPP_BIN/python" -m pytest -m 'not matrix and not slow')
if (($#)) || ! nvidia-smi -L >/dev/null 2>&1; then exec "${tests[@]}" "$@"; fi
status=0
"${tests[@]}" || status=$?
"${tests[@]}" tests/gpu || status=$?
exit "$status"
