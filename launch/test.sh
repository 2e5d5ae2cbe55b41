#!/usr/bin/env bash
# Makes the environment if needed, then runs the tests:
#
#   ./launch/test.sh                   everything that CI runs
#   ./launch/test.sh --quick           a choice that covers every room, in two minutes (tests/quick.py)
#   ./launch/test.sh -m 'matrix or slow'   what that leaves out
#   ./launch/test.sh --last-green      when all of that last passed (tests/last_green.json)
#   ./launch/test.sh [pytest args]     what these ask for, in one process
#
# Without a -m of your own the default selection runs: no layout matrix, nothing slow. Tests that need
# a GPU are a session of their own, tests/gpu: the second one here, where there is a GPU and nothing is
# asked for. Paths are relative to the repository.
#
# Reads  MOEPP_TEST_WORKERS  how many processes share the tests of the first three
set -euo pipefail
if [[ ${1-} = --last-green ]]; then
    cat -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../tests/last_green.json" 2>/dev/null && exit
    echo "no whole green run of -m 'matrix or slow' is recorded" >&2
    exit 1
fi
# shellcheck disable=SC2034  # read by env.sh
MOEPP_DEV=1
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

cd -- "$MOEPP_ROOT"
# Two more than cores, for tests that wait; each may have ranks of its own in memory.
cores=$(nproc 2>/dev/null || echo 2)
workers=$((cores < 5 ? cores + 2 : 7))
shared=(--no-loadscope-reorder -n)
for argument; do
    case $argument in
    # Nothing of it waits.
    --quick) workers=$((cores < 5 ? cores : 5)) ;;
    --record-durations | -m | matrix | slow | 'matrix or slow') ;;
    *) shared=() ;;
    esac
done
if ((${#shared[@]})); then
    shared+=("${MOEPP_TEST_WORKERS:-$workers}")
    # Each worker and each of some hundred processes would compile all that it imports.
    unset PYTHONDONTWRITEBYTECODE
    # Workers and ranks have the cores between them; more threads would wait for each other, spinning.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
# pytest's exit status is ours, 5 (nothing collected) included; a later -m replaces this one.
tests=("$MOEPP_BIN/python" -m pytest -m 'not matrix and not slow')
if (($#)) || ! nvidia-smi -L >/dev/null 2>&1; then exec "${tests[@]}" "${shared[@]}" "$@"; fi
status=0
"${tests[@]}" "${shared[@]}" || status=$?
"${tests[@]}" tests/gpu || status=$?
exit "$status"
