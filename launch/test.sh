#!/usr/bin/env bash
# Makes the environment if needed, then runs the tests:  ./launch/test.sh [pytest args]
# Without a -m of your own the default selection runs: no layout matrix, nothing slow, and
# GPU tests only where there is a GPU. Paths are relative to the repository.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

cd -- "$MOEPP_ROOT"
selection='not matrix and not slow'
nvidia-smi -L >/dev/null 2>&1 || selection+=' and not gpu'
# pytest's exit status is ours, 5 (nothing collected) included; a later -m replaces this one.
exec "$MOEPP_BIN/python" -m pytest -m "$selection" "$@"
