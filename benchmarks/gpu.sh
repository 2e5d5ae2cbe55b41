#!/usr/bin/env bash
# Everything that needs a GPU, on one card (an H100), into one file:
#
#   benchmarks/gpu.sh [--steps tests,card,layer,step] [--work DIR] [--out DIR] [--allow-cpu]
#
# tests   tests/gpu: correctness in fp32, bf16 and FP8
# card    the card's own matrix products and copy
# layer   the MoE++ layer against megatron-core's vanilla one: four shapes, five taus, bf16 and FP8
# step    whole training steps of the 0.6B model against its vanilla rival, bf16 and FP8
#
# Writes OUT/<card>.json (default benchmarks/results). What each step leaves stays in WORK (default
# runs/gpu_sh), so steps may be run one by one. All steps run even after one fails; the exit status is
# 0 if all passed, but for those that this machine cannot do: FP8 needs Transformer Engine, which is
# not installed here (pip install -e '.[te]'). --allow-cpu tries the script with tiny sizes where there
# is no GPU; its numbers are no card's and go to WORK.
set -euo pipefail
command="benchmarks/gpu.sh $*"
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)

steps=tests,card,layer,step work=$root/runs/gpu_sh out='' allow_cpu=''

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}
while (($#)); do
    case $1 in
        --steps | --work | --out)
            (($# > 1)) || die "$1 must be followed by a value; see the head of benchmarks/gpu.sh"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --allow-cpu) allow_cpu=--allow-cpu ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) die "argument ($1) must be --steps, --work, --out or --allow-cpu" ;;
    esac
    shift
done
IFS=, read -r -a chosen <<<"$steps"
for name in "${chosen[@]}"; do
    [[ $name =~ ^(tests|card|layer|step)$ ]] ||
        die "--steps ($name) must be of tests, card, layer, step; use --steps card,layer"
done

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
if ((gpus == 0)) && [[ -z $allow_cpu ]]; then
    die 'benchmarks/gpu.sh needs a CUDA GPU; use --allow-cpu to try the script' 3
fi

# shellcheck disable=SC2034  # read by env.sh: tests are run
MOEPP_DEV=1
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
work=$(realpath -m -- "$work") out=${out:+$(realpath -m -- "$out")}
cd -- "$root"
mkdir -p -- "$work"
commit=$(git describe --always --dirty --abbrev=40 2>/dev/null || printf unknown)

has() { [[ ,$steps, == *,$1,* ]]; }
failed=0
# Runs a step under a name and notes how it ended.
run() {
    local name=$1 begin=$SECONDS status=0
    shift
    printf '\n==== %s\n' "$name"
    "$@" || status=$?
    # 3: this machine cannot do it, with the reason above.
    ((status == 0 || status == 3)) || failed=1
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$commit" >>"$work/steps.tsv"
}
bench() {
    local name=$1
    shift
    rm -f -- "$work/$name.json"
    run "$name" "$MOEPP_BIN/moepp" bench "$@" --json "$work/$name.json"
}

if ((gpus > 0)); then
    # A micro-batch of eight sequences of the paper's length.
    layer=(--shapes '0.6B,1B,2B,7B' --taus '0.1,0.25,0.5,0.75,1.0' --tokens 16384 --rounds 30)
    precisions=(bf16 fp8:delayed fp8:tensorwise fp8:blockwise)
    card=()
    step=(configs/models/moepp_0.6b_8_4.yaml run.dir=unused training.micro_batch_size=4
        training.global_batch_size=8 --rounds 20)
else
    layer=(--shapes 0.6B --taus 0.75 --tokens 64 --rounds 2)
    precisions=(bf16)
    card=(--size 256 --megabytes 16)
    step=(configs/quickstart.yaml run.dir=unused parallel.expert_model_parallel_size=1
        model.num_layers=2 training.micro_batch_size=1 training.global_batch_size=1 --rounds 2)
fi

if has tests; then
    run tests "$MOEPP_BIN/python" -m pytest tests/gpu --junitxml="$work/tests.xml"
fi
if has card || [[ ! -e $work/card.json ]]; then
    bench card card ${card[@]+"${card[@]}"}
fi
for precision in "${precisions[@]}"; do
    name=${precision/:/_} fp8=()
    overrides=(precision.dtype=bf16)
    if [[ $precision == fp8:* ]]; then
        fp8=(--fp8-recipe "${precision#fp8:}")
        overrides+=(precision.fp8=hybrid "precision.fp8_recipe=${precision#fp8:}")
    fi
    if has layer; then
        bench "layer_$name" layer "${layer[@]}" --dtype "${precision%%:*}" ${fp8[@]+"${fp8[@]}"}
    fi
    if has step; then
        bench "step_$name" step "${step[@]}" "${overrides[@]}"
    fi
done

if ((gpus == 0)); then out=${out:-$work}; fi
printf '\n'
"$MOEPP_BIN/python" -m benchmarks.record "$work" --out "${out:-benchmarks/results}" \
    --command "$command" ${allow_cpu:+"$allow_cpu"} || failed=1
exit "$failed"
