#!/usr/bin/env bash
# The plan of docs/gpu.md for one Hopper GPU that is lent for half an hour: ten minutes a command, 64 MiB
# a transfer, no network, Python 3.12 with torch 2.11 and its usual packages:
#
#   MOEPP_COMMIT=$(git rev-parse HEAD) benchmarks/lent_gpu.sh CALL [--rehearse] [--work DIR]
#
# CALL 0 makes ready, where there is a network and no GPU, what the others carry: build/whl with
# build/te, in call 3 with build/serve instead. Calls 1 to 3 run there, each whole in itself and within nine minutes, and leave record, logs
# and traces in OUT (default benchmarks/results); the same call again runs what the limit cut off. They
# work in memory (/dev/shm). --rehearse plays a call here, with its limit and tiny sizes, and installs
# nothing.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
cd -- "$root"
limit=540 more=() out=${OUT:-benchmarks/results} work=/dev/shm/moepp
case ${1:-} in
    0) ;;
    1) steps=card,kernels,train,fp8,step_bf16,step_micro4,trace ;;
    2)
        steps=step_7b,layer_bf16,layer_bf16_cutlass,counters,step_fp8_blockwise,layer_fp8_blockwise
        more=(--shapes '0.6B,7B' --taus 0.75)
        ;;
    3) steps=tests_training,graphs,resume,serve,tests ;;
    *)
        printf 'error: the call (%s) must be 0 to 3; see the head of benchmarks/lent_gpu.sh\n' "${1:-}" >&2
        exit 2
        ;;
esac
if [[ $1 == 0 ]]; then
    export MOEPP_PAIR=torch2.11 MOEPP_TE=1
    # shellcheck source=launch/env.sh
    source launch/env.sh
    rm -rf -- build/whl build/te build/serve build/core
    get=("$MOEPP_BIN/python" -m pip download -q --no-deps -c constraints-torch2.11.txt -d)
    "${get[@]}" build/whl megatron-core pydantic pydantic-core annotated-types typing-inspection setuptools
    "${get[@]}" build/te transformer_engine nvdlfw-inspect nvidia-cudnn-frontend importlib-metadata
    "${get[@]}" build/serve transformers tokenizers huggingface-hub safetensors regex tqdm pyyaml filelock \
        httpx2 httpcore2 anyio idna certifi h11 sniffio truststore click typer
    "${get[@]}" build/core transformer_engine_cu13
    "$MOEPP_BIN/python" -m benchmarks.one_architecture build/core/*.whl --sm 90 --out build/te
    cp -- .wheels/transformer_engine_torch-*-cp312-*.whl build/te
    du -sh build/whl build/te build/serve
    exit
fi
case " $* " in
    *' --rehearse '*) [[ ${3:-} != --work ]] || work=${4:-} ;;
    *)
        export MOEPP_ENV=current
        install=(python3 -m pip install -q --no-index --no-deps)
        [[ ! -d build/serve ]] || "${install[@]}" build/serve/*.whl
        if ! command -v moepp >/dev/null; then
            "${install[@]}" build/whl/*.whl
            "${install[@]}" build/te/*.whl || true
            "${install[@]}" --no-build-isolation -e .
            moepp doctor || true
        fi
        ;;
esac
status=0
# 20 s for packing.
benchmarks/gpu.sh --steps "$steps" --limit "$((limit - 20 - SECONDS))" --out "$out" --work "$work" \
    ${more[@]+"${more[@]}"} "${@:2}" || status=$?
# Checkpoints and data stay; what comes back is few files of 16 MiB at most.
mkdir -p -- "$out"
wanted='\./([^/]+\.[a-z]+|run_[^/]+/([^/]+\.(jsonl|yaml)|profile/[^/]+))'
(cd -- "$work" && find . -regextype posix-extended -type f -regex "$wanted" -print0 | tar -cz --null -T -) |
    split -b 15M -d - "$out/call_$1.tar.gz."
exit "$status"
