#!/usr/bin/env bash
# Runs tests/bridge with Megatron-Bridge, which goes into build/bridge, before the packages of the Python 3.12 pair:
#
#   tests/bridge/run.sh [pytest args]
#
# Bridge imports Transformer Engine; tests/te_stand_in takes its place where there is no GPU.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd)
cd -- "$root"
# shellcheck disable=SC2034  # both read by env.sh
MOEPP_DEV=1 MOEPP_PAIR=torch2.11
# shellcheck source=launch/env.sh
source launch/env.sh
wanted=tests/bridge/requirements.txt target=build/bridge
if ! cmp -s -- "$wanted" "$target/requirements.txt"; then
    rm -rf -- "$target"
    # In one call: what it unpacks into the same folder (megatron/) a second one would leave out.
    "$MOEPP_BIN/python" -m pip install -q --disable-pip-version-check --no-deps --target "$target" -r "$wanted"
    cp -- "$wanted" "$target/requirements.txt"
fi
export PYTHONPATH=$root/tests/te_stand_in:$root/$target:$root CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1
exec "$MOEPP_BIN/python" -m pytest -q -p no:cacheprovider tests/bridge "$@"
