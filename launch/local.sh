#!/usr/bin/env bash
# Trains on this machine, one rank a GPU (two CPU ranks where there is none):
#
#   ./launch/local.sh CONFIG [section.key=value ...] [--nproc N] [--log-dir DIR] [...]
#
# Everything else is `moepp train`'s: see  moepp train --help.  Makes the environment if needed.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# shellcheck source=launch/ranks.sh
source "$MOEPP_ROOT/launch/ranks.sh"

# An --nproc of the user comes later and wins.
exec "$MOEPP_BIN/moepp" train --nproc "$(moepp_ranks_here)" "$@"
