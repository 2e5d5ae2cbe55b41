#!/usr/bin/env bash
# A small MoE++ model in Megatron-LM's own training loop:
#
#   ./launch/pretrain_megatron_lm.sh [Megatron's and MoE++'s arguments ...]
#
# Mock data and two ranks with expert parallelism, on the devices here (CPU ranks without a GPU). For
# text: --data-path PREFIX instead of --mock-data. NPROC=4 starts four ranks.
set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"
# shellcheck source=launch/ranks.sh
source "$MOEPP_ROOT/launch/ranks.sh"
cd -- "$MOEPP_ROOT"

model=(
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
    --seq-length 64 --max-position-embeddings 64
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
)
experts=(
    # FFN experts only; the zero-computation experts come with --moepp-num-*-experts.
    --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01
    --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2
    --moepp-num-zero-experts 1 --moepp-num-copy-experts 1 --moepp-num-constant-experts 2
    --moepp-tau 0.75
)
training=(
    --micro-batch-size 4 --global-batch-size 16 --train-iters 20 --lr 1e-3 --lr-decay-style constant
    --calculate-per-token-loss --use-distributed-optimizer --log-interval 5
    --eval-interval 20 --eval-iters 1
)
data=(--tokenizer-type NullTokenizer --vocab-size 255)
[[ " $* " == *" --data-path "* ]] || data+=(--mock-data)
devices=(--bf16)
if [[ $(moepp_gpus) == 0 ]]; then
    devices=(
        --distributed-backend gloo --transformer-impl local --use-cpu-initialization
        --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
        --no-rope-fusion --no-persist-layer-norm
    )
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
# Megatron asks for it with tensor or context parallelism on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
"$MOEPP_BIN/torchrun" --nproc-per-node "${NPROC:-2}" launch/pretrain_megatron_lm.py \
    "${model[@]}" "${experts[@]}" "${training[@]}" "${data[@]}" "${devices[@]}" "$@"
