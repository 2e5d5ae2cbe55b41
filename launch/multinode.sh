#!/usr/bin/env bash
# Trains on several machines without a scheduler. Run the same on each of them:
#
#   ./launch/multinode.sh CONFIG [section.key=value ...] \
#       --nnodes N --node-rank R --rdzv-endpoint HOST:PORT [--nproc N] [--max-restarts N] [...]
#
# HOST is machine 0's address as the others reach it. One rank a GPU unless --nproc says otherwise.
# Paths in CONFIG must mean the same shared folders on all machines. A machine that was lost joins
# again when this is run there again; the others wait for it for --restart-timeout seconds (900 here),
# at most --max-restarts times.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# shellcheck source=launch/ranks.sh
source "$MOEPP_ROOT/launch/ranks.sh"

# Options of the user come later and win. Each rank's own output stays on its machine.
exec "$MOEPP_BIN/moepp" train --resume --nproc "$(moepp_ranks_here)" --max-restarts 3 --restart-timeout 900 \
    --log-dir "${TMPDIR:-/tmp}/moepp-logs-$UID" "$@"
