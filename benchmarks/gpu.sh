#!/usr/bin/env bash
# Everything that needs a GPU, on one card (an H100), into one file:
#
#   benchmarks/gpu.sh [--steps NAME,...] [--shapes NAME,...] [--taus TAU,...] [--limit SECONDS]
#                     [--work DIR] [--out DIR] [--again] [--rehearse | --wide]
#
# card     the card's own matrix products and copy, without which there is no record
# kernels  tests/gpu of kernels and layer
# train    20 steps of the 0.6B model on Python's own sources: loss, time, memory; with Transformer
#          Engine, where it is, and without
# layer    the MoE++ layer against megatron-core's vanilla one: four shapes, five taus, bf16 and FP8;
#          without the kernels of moe.fused; with CUTLASS's grouped product; with 2, 30 and 62
#          constant experts; --shapes and --taus choose others
# fp8      tests/gpu of Transformer Engine: its signatures, and FP8
# tests    the rest of tests/gpu, a part by file: training, documents, moments, NVML, bench
# step     whole training steps and their energy against the vanilla rival: the 0.6B model in
#          micro-batches of 16, in bf16 and FP8, and of 4, there with static rows too; the 7B model
#          with four layers
# resume   the run of train, from its checkpoint
# graphs   the runs of train with attention and router as CUDA graphs; with whole MoE parts, static rows
# serve    an export and a Mixtral of its size in transformers, decoding compiled, at three batches
# trace    torch's trace of two steps of the 0.6B model: kernels, gaps, waits
# counters Nsight Compute's counters of moepp_combine_*, at 2 and 30 constants
# pair     two GPUs: a run each with EP, TP, PP and CP over NCCL
#
# In this order unless --steps names some; it may also name one part of layer, step or tests, such as
# layer_bf16_cutlass. A part that leaves no result has failed. Writes OUT/<card>.json (default benchmarks/results), which
# `python -m benchmarks.gpu_page` makes a page of. What each part leaves stays in WORK (default runs/gpu_sh),
# the caches of Triton and Inductor too. A part ends after ten minutes at most, and all of them, with what they left
# written to the record, within --limit; one that has passed with this commit (MOEPP_COMMIT, where
# there is no git) is not run again, so the same command continues after a break (--again runs it
# anyway). All parts run even after one fails; the exit status is 0 if all passed, but for those that
# this machine cannot do (a second GPU, or FP8 without Transformer Engine: launch/env.sh --te).
# Nothing is downloaded, given an environment (docs/gpu.md).
# --rehearse (or --allow-cpu) runs every part with tiny sizes where there is no GPU; its numbers are
# no card's and go to WORK. --wide does so at full width: few layers and tokens, the parts' real models.
set -euo pipefail
command="benchmarks/gpu.sh $*"
root=$(cd -P -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)

steps=card,kernels,train,layer,fp8,tests,step,resume,graphs,serve,trace,counters,pair
known=${steps//,/|}
formats='bf16|fp8_(delayed|tensorwise|blockwise)'
files=(training documents moments nvml bench)
known_one="layer_($formats|bf16_(no_kernels|cutlass|constants_(2|30|62)))|step_($formats|micro4|7b)"
known_one+="|tests_($(IFS='|' && printf '%s' "${files[*]}"))"
work=$root/runs/gpu_sh out='' allow_cpu='' wide='' again='' limit='' shapes='' taus=''

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}
while (($#)); do
    case $1 in
        --steps | --work | --out | --limit | --shapes | --taus)
            (($# > 1)) || die "$1 must be followed by a value; see the head of benchmarks/gpu.sh"
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        --allow-cpu | --rehearse) allow_cpu=--allow-cpu ;;
        --wide) allow_cpu=--allow-cpu wide=1 ;;
        --again) again=1 ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) die "argument ($1) must be --steps, --shapes, --taus, --limit, --work, --out, --again, --rehearse or --wide" ;;
    esac
    shift
done
IFS=, read -r -a chosen <<<"$steps"
for name in "${chosen[@]}"; do
    [[ $name =~ ^($known|$known_one)$ ]] ||
        die "--steps ($name) must be of ${known//|/, }; use --steps card,layer"
done
# What the record and the end of a part may take.
spare=30
[[ -z $limit || $limit =~ ^[1-9][0-9]{1,5}$ && $limit -gt $spare ]] ||
    die "--limit ($limit) must be a number of seconds above $spare; use --limit 240"

# shellcheck source=launch/ranks.sh
source "$root/launch/ranks.sh"
gpus=$(moepp_gpus)
if ((gpus == 0)) && [[ -z $allow_cpu ]]; then
    die 'benchmarks/gpu.sh needs a CUDA GPU; use --rehearse to try the script' 3
fi

# shellcheck disable=SC2034  # read by env.sh: tests are run
MOEPP_DEV=1
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
work=$(realpath -m -- "$work") out=${out:+$(realpath -m -- "$out")}
cd -- "$root"
mkdir -p -- "$work"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}
commit=${MOEPP_COMMIT:-$(git describe --always --dirty --abbrev=40 2>/dev/null || printf unknown)}

has() { [[ ,$steps, == *,$1,* || ,$steps, == *,${1%%_*},* ]]; }
failed=0 left=() choice=''
# Ends the part that runs, and with it the script.
# shellcheck disable=SC2317  # called by the trap
interrupted() {
    local part
    # What is running, as bash knows it: a signal can come before a line after the start has run.
    for part in $(jobs -pr); do
        kill "$part" 2>/dev/null && wait "$part"
    done || true
    die 'interrupted; the same command continues' 130
}
trap interrupted INT TERM
# Whether a part has passed with this commit. Changes that are not committed have no name to go by.
passed() {
    [[ -z $again && $commit != @(*-dirty|unknown) && -e $work/steps.tsv ]] || return 1
    local last
    last=$(awk -F'\t' -v name="$1" '$1 == name {line = $2 " " $4 " " $5} END {print line}' \
        "$work/steps.tsv")
    [[ $last == "0 $commit $choice" ]]
}
# Runs a part under a name, for ten minutes and until the limit at most, and notes how it ended.
run() {
    local name=$1 begin=$SECONDS status=0 seconds=600
    shift
    printf '\n==== %s\n' "$name"
    if passed "$name"; then
        printf 'passed before with %.12s\n' "$commit"
        return
    fi
    if [[ -n $limit ]] && ((limit - spare - SECONDS < seconds)); then
        seconds=$((limit - spare - SECONDS))
    fi
    if ((seconds < 5)); then
        printf 'left out: --limit is reached\n'
        left+=("$name") failed=1
        return
    fi
    # Waited for, not in the foreground: no Ctrl-C reaches what `timeout` runs, in its own group.
    timeout --kill-after=15 --signal="${ends:-TERM}" "$seconds" "$@" > >(tee -- "$work/$name.log") &
    wait "$!" || status=$?
    if ((status == 0)) && [[ -n ${leaves:-} ]] && ! compgen -G "$leaves" >/dev/null; then
        printf 'failed: left no %s\n' "$leaves"
        status=1
    fi
    # 3: this machine cannot do it, with the reason above.
    ((status == 0 || status == 3)) || failed=1
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - begin))" "$commit" "$choice" \
        >>"$work/steps.tsv"
}
bench() {
    local name=$1 choice='' leaves=$work/$1.json
    shift
    has "$name" || return 0
    [[ $name != layer_* ]] || choice="$shapes $taus"
    passed "$name" || rm -f -- "$leaves"
    run "$name" "$MOEPP_BIN/moepp" bench "$@" --json "$leaves"
}

# A run of training into WORK/run_NAME; one of before is moved aside.
train() {
    local name=$1
    shift
    run "run_$name" "$MOEPP_BIN/moepp" train "${model[@]}" "run.dir=$work/run_$name" --overwrite "$@"
}
# Transformer Engine as if it were not there: a package of its name that cannot be imported.
without_te() {
    local -x PYTHONPATH=$work/without_te${PYTHONPATH:+:$PYTHONPATH}
    mkdir -p -- "$work/without_te/transformer_engine"
    printf 'raise ImportError("set aside by gpu.sh")\n' >"$work/without_te/transformer_engine/__init__.py"
    "$@"
}
train_both_ways() {
    local name=$1
    shift
    without_te train "$name" "$@" ${saves[@]+"${saves[@]}"}
    if "$MOEPP_BIN/python" -c 'import importlib.util as u; exit(not u.find_spec("transformer_engine"))'
    then
        train "${name}_te" "$@"
    fi
}
corpus() {
    [[ -e $work/corpus ]] ||
        run corpus "$MOEPP_BIN/moepp" data prepare stdlib --out "$work/corpus" --vocab-size 4096
}

# Saved once, to be resumed: 8 GB of the 0.6B model.
saves=() once=(checkpoint.save_interval=20) further=30
length=(training.train_iters=20 checkpoint.save_interval=0 optimizer.warmup_iters=0)
if ((gpus > 0)); then
    # A micro-batch of eight sequences of the paper's length.
    layer=(--tokens 16384 --rounds 30)
    all=(--shapes '0.6B,1B,2B,7B' --taus '0.1,0.25,0.5,0.75,1.0')
    one=(--shapes 7B --taus 0.75) many=(--shapes '2B,7B' --taus 0.75)
    precisions=(bf16 fp8:delayed fp8:tensorwise fp8:blockwise)
    card=()
    model=(configs/models/moepp_0.6b_8_4.yaml "data.path=$work/corpus" training.micro_batch_size=4
        training.global_batch_size=8 "${length[@]}")
    step=(configs/models/moepp_0.6b_8_4.yaml run.dir=unused training.micro_batch_size=16
        training.global_batch_size=16 --rounds 20)
    micro4=(training.micro_batch_size=4 training.global_batch_size=8 moe.static_rows=1.25)
    # Both models lie in memory at once: 5.6 GB a layer.
    large=(configs/models/moepp_7b_16_4.yaml run.dir=unused model.num_layers=4 --rounds 10
        parallel.expert_model_parallel_size=1 training.global_batch_size=4)
    if [[ -n $shapes$taus ]]; then
        all=(--shapes "${shapes:-7B}" --taus "${taus:-0.75}") one=("${all[@]}") many=("${all[@]}")
    fi
    # Most of their time is a core's, which compiles kernels.
    tests=() many_at_once=(-n 8)
else
    layer=(--tokens 64 --rounds 2)
    all=(--shapes 0.6B --taus 0.75)
    one=("${all[@]}") many=("${all[@]}")
    precisions=(bf16)
    card=(--size 256 --megabytes 16)
    once=(checkpoint.save_interval=2) further=4 micro4=(moe.static_rows=1.25)
    tiny=(model.num_layers=2 training.micro_batch_size=1)
    # Two sequences a step, so that two ranks have one each.
    model=(configs/quickstart.yaml parallel.expert_model_parallel_size=1 training.global_batch_size=2
        "data.path=$work/corpus" "${tiny[@]}" training.train_iters=2
        checkpoint.save_interval=0 optimizer.warmup_iters=0)
    step=(configs/quickstart.yaml run.dir=unused parallel.expert_model_parallel_size=1
        training.global_batch_size=1 "${tiny[@]}" --rounds 2)
    large=("${step[@]}")
    if [[ -n $wide ]]; then
        layer=(--tokens 2048 --rounds 1)
        all=(--shapes 7B --taus 0.75)
        one=("${all[@]}") many=("${all[@]}")
        tiny=(model.num_layers=2 training.micro_batch_size=1 training.global_batch_size=2)
        model=(configs/models/moepp_0.6b_8_4.yaml "data.path=$work/corpus" "${tiny[@]}" "${length[@]}"
            training.train_iters=2)
        step=(configs/models/moepp_0.6b_8_4.yaml run.dir=unused "${tiny[@]}" --rounds 1)
        # 16 GB, of 22 with all experts; a loader's process would keep a copy of all of it.
        large=(configs/models/moepp_7b_16_4.yaml run.dir=unused model.num_layers=1 --rounds 1
            moe.num_ffn_experts=8 data.num_workers=0
            parallel.expert_model_parallel_size=1 training.micro_batch_size=1 training.global_batch_size=1)
    fi
    export MOEPP_TESTS_CARD=cpu
    tests=(--collect-only -q) many_at_once=()
fi
first=(tests/gpu/test_kernels.py tests/gpu/test_layer.py)
engine=(tests/gpu/test_te_signatures.py tests/gpu/test_fp8.py)
# At the limit pytest is interrupted, so that it writes what has passed.
run_tests() {
    local name=$1 ends=INT leaves=$work/$1.xml
    shift
    has "$name" || return 0
    passed "$name" || rm -f -- "$leaves"
    run "$name" env --default-signal=INT "$MOEPP_BIN/python" -m pytest "$@" \
        ${tests[@]+"${tests[@]}"} --junitxml="$leaves"
}

if has card || [[ ! -e $work/card.json ]]; then
    passed card || rm -f -- "$work/card.json"
    run card "$MOEPP_BIN/python" -m benchmarks.card "$work/card.json" ${card[@]+"${card[@]}"}
fi
run_tests kernels "${first[@]}" ${many_at_once[@]+"${many_at_once[@]}"}
if has train; then
    corpus
    saves=("${once[@]}")
    train_both_ways first
    saves=()
fi
for precision in "${precisions[@]}"; do
    fp8=()
    [[ $precision == fp8:* ]] && fp8=(--fp8-recipe "${precision#fp8:}")
    bench "layer_${precision/:/_}" layer "${all[@]}" "${layer[@]}" --dtype "${precision%%:*}" \
        ${fp8[@]+"${fp8[@]}"}
done
bench layer_bf16_no_kernels layer "${one[@]}" "${layer[@]}" --dtype bf16 --fused false
# Against layer_bf16: all experts of a layer in one kernel.
NVTE_USE_CUTLASS_GROUPED_GEMM=1 bench layer_bf16_cutlass layer "${many[@]}" "${layer[@]}" \
    --dtype bf16
for constants in 2 30 62; do
    bench "layer_bf16_constants_$constants" layer "${one[@]}" "${layer[@]}" --dtype bf16 \
        --constants "$constants"
done
run_tests fp8 "${engine[@]}"
for file in "${files[@]}"; do
    run_tests "tests_$file" "tests/gpu/test_$file.py"
done
for precision in "${precisions[@]}"; do
    overrides=(precision.dtype=bf16)
    [[ $precision == fp8:* ]] &&
        overrides+=(precision.fp8=hybrid "precision.fp8_recipe=${precision#fp8:}")
    bench "step_${precision/:/_}" step "${step[@]}" "${overrides[@]}"
done
# With static rows as a third model.
bench step_micro4 step "${step[@]}" precision.dtype=bf16 "${micro4[@]}"
bench step_7b step "${large[@]}" precision.dtype=bf16
if has resume; then
    [[ -e $work/run_first ]] || { corpus && without_te train first "${once[@]}"; }
    without_te run resume "$MOEPP_BIN/moepp" train "${model[@]}" "run.dir=$work/run_first" --resume \
        "training.train_iters=$further"
fi
if has graphs && ((gpus > 0)); then
    corpus
    train_both_ways graphs 'training.cuda_graphs=[attn,moe_router]'
    without_te train graphs_static 'training.cuda_graphs=[attn,moe]' moe.static_rows=1.25
fi
if has serve; then
    serve=("$MOEPP_BIN/python" -m benchmarks.serve_throughput "$work/serve.jsonl" --compiled)
    [[ -z $allow_cpu || -n $wide ]] || serve+=(--tiny)
    "$MOEPP_BIN/python" -c 'import transformers' 2>/dev/null ||
        serve=(bash -c 'echo "transformers is not installed"; exit 3')
    passed serve || rm -f -- "$work/serve.jsonl"
    leaves=$work/serve.jsonl run serve "${serve[@]}"
fi
if has trace; then
    corpus
    leaves="$work/run_trace/profile/*" train trace training.train_iters=4 \
        'training.profile_steps=[3,4]'
fi
if has counters && ((gpus > 0)); then
    ncu=(bash -c 'echo "no ncu on the PATH"; exit 3')
    if command -v ncu >/dev/null; then
        # Without a kernel of that name it ends with 0.
        ncu=(bash -o pipefail -c '"$@" | awk "{print} /^\"[0-9].*moepp_combine/ {n++} END {exit !n}"' ncu
            ncu --target-processes all --kernel-name 'regex:moepp_combine' --launch-count 12 --csv
            --section SpeedOfLight --section Occupancy --section LaunchStats)
    fi
    for constants in 2 30; do
        run "counters_$constants" "${ncu[@]}" "$MOEPP_BIN/moepp" bench layer "${one[@]}" --rounds 1 \
            --tokens 16384 --dtype bf16 --constants "$constants"
    done
fi
if has pair && ((gpus != 1)); then
    corpus
    train ep --nproc 2 parallel.expert_model_parallel_size=2
    train tp --nproc 2 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true
    train pp --nproc 2 parallel.pipeline_model_parallel_size=2
    train cp --nproc 2 parallel.context_parallel_size=2
    if "$MOEPP_BIN/python" -c 'import deep_ep' 2>/dev/null; then
        train deepep --nproc 2 parallel.expert_model_parallel_size=2 moe.dispatcher=flex
    fi
fi

if ((gpus == 0)); then out=${out:-$work}; fi
printf '\n'
if ((${#left[@]})); then printf 'left out by --limit: %s; the same command continues\n' "${left[*]}"; fi
"$MOEPP_BIN/python" -m benchmarks.record "$work" --out "${out:-benchmarks/results}" \
    --command "$command" ${allow_cpu:+"$allow_cpu"} || failed=1
exit "$failed"
