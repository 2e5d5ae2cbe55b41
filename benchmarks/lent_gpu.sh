#!/usr/bin/env bash
# The plan of docs/gpu.md for one Hopper GPU that is lent for half an hour: ten minutes a command, 64 MiB
# a transfer, no network, Python 3.12 with torch 2.11 and its usual packages:
#
#   MOEPP_COMMIT=$(git rev-parse HEAD) benchmarks/lent_gpu.sh CALL [--rehearse]
#
# CALL 0 makes ready, where there is a network and no GPU, what is carried: build/whl for call 1 and
# build/te for call 3. Calls 1 to 8 run there in this order, each within its limit, and leave the record
# in OUT (default benchmarks/results). After a lost machine: call 1 again, then the call that was lost.
# --rehearse plays a call here, with its limit and tiny sizes, and installs nothing.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
cd -- "$root"
more=() limit=0
case ${1:-} in
    0) ;;
    1) steps=kernels limit=240 ;;
    2) steps=card,train,resume,graphs limit=210 ;;
    3) steps=fp8 limit=190 ;;
    4) steps=layer_bf16,layer_bf16_cutlass limit=200 more=(--shapes '0.6B,7B' --taus 0.75) ;;
    5) steps=train,graphs,step_bf16 limit=190 ;;
    6) steps=trace,counters limit=130 ;;
    7) steps=tests limit=270 ;;
    8) steps=layer_fp8_blockwise,step_fp8_blockwise limit=150 more=(--shapes 7B --taus 0.75) ;;
    *)
        printf 'error: the call (%s) must be 0 to 8; see the head of benchmarks/lent_gpu.sh\n' "${1:-}" >&2
        exit 2
        ;;
esac
if [[ $1 == 0 ]]; then
    export MOEPP_PAIR=torch2.11 MOEPP_TE=1
    # shellcheck source=launch/env.sh
    source launch/env.sh
    get=("$MOEPP_BIN/python" -m pip download -q --no-deps -c constraints-torch2.11.txt -d)
    "${get[@]}" build/whl megatron-core pydantic pydantic-core annotated-types typing-inspection setuptools
    "${get[@]}" build/te transformer_engine nvdlfw-inspect nvidia-cudnn-frontend importlib-metadata
    "${get[@]}" build/core transformer_engine_cu13
    "$MOEPP_BIN/python" -m benchmarks.one_architecture build/core/*.whl --sm 90 --out build/te
    cp -- .wheels/transformer_engine_torch-*-cp312-*.whl build/te
    du -sh build/whl build/te
    exit
fi
if [[ ${2:-} != --rehearse ]]; then
    export MOEPP_ENV=current
    install=(python3 -m pip install -q --no-index --no-deps)
    case $1 in
        1)
            "${install[@]}" build/whl/*.whl
            "${install[@]}" --no-build-isolation -e .
            moepp doctor || true
            ;;
        3) "${install[@]}" build/te/*.whl ;;
    esac
fi
benchmarks/gpu.sh --steps "$steps" --limit "$((limit - SECONDS))" ${OUT:+--out "$OUT"} "${more[@]}" "${@:2}"
