#!/usr/bin/env python3
"""MoE++ layers in a training loop of your own, on nothing but megatron-core.

    .venv/bin/python -m torch.distributed.run --nproc-per-node 2 examples/own_megatron_loop.py

Nothing of this package's trainer is used: `moepp_megatron.moe` gives the layers, and everything
else is megatron-core's, with its plain GPTModel. The lines marked MoE++ are what you add to a loop
that you have. FFN experts are split between the ranks, each of which reads sequences of its own;
one rank that reads all of them gets the same losses. Without a GPU it runs on the CPU, over gloo.
"""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.runtime import cpu_support
from moepp_megatron.runtime.optional import quiet

quiet()
# Where there is no GPU, megatron-core's calls of CUDA are mapped onto the CPU. Before its imports.
ON_CPU = cpu_support.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from moepp_megatron import MoEPPConfig, get_moepp_block_spec  # noqa: E402
from moepp_megatron.model.initialize import initialize_weights  # noqa: E402
from moepp_megatron.model.local_modules import fit_local_modules  # noqa: E402
from moepp_megatron.moe.layer import moe_statistics  # noqa: E402
from moepp_megatron.runtime.optional import have_transformer_engine  # noqa: E402

VOCABULARY, SEQUENCE, SEQUENCES, SEED = 256, 32, 8, 1

# MoE++: the paper's 8 FFN, 2 constant, 1 copy and 1 zero experts.
MOEPP = MoEPPConfig(
    num_ffn_experts=8,
    num_constant_experts=2,
    num_copy_experts=1,
    num_zero_experts=1,
    router_topk=2,
    tau=0.75,
    # Over the tokens of all ranks: over each rank's own, the loss would depend on their number.
    balance_scope="global",
)


def start() -> None:
    """Join the ranks that torchrun has started, and split the FFN experts between them."""
    if not ON_CPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("gloo" if ON_CPU else "nccl")
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)


def build() -> tuple[GPTModel, DistributedDataParallel]:
    """Megatron's model with MoE++ layers, and the wrapper that reduces its gradients."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        # MoE++: only FFN experts; the layer's spec adds the others.
        num_moe_experts=MOEPP.num_ffn_experts,
        moe_router_topk=MOEPP.router_topk,
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(),
        # MoE++: layers differ in their weights, since the first has no gating residual.
        hetereogenous_dist_checkpoint=True,
        # MoE++: the layers attach the balance loss themselves (MoEPPConfig.balance_coeff); this
        # says that finalize_model_grads ends a step, which balance_scope="global" needs.
        moe_router_load_balancing_type="global_aux_loss",
        moe_router_dtype="fp32",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,
        use_cpu_initialization=ON_CPU,
        perform_initialization=False,
    )
    has_te = have_transformer_engine()
    # MoE++: the block. `adapt` is for machines without Transformer Engine.
    spec = get_moepp_block_spec(
        config, MOEPP, use_transformer_engine=has_te, adapt=None if has_te else fit_local_modules
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    model.to(torch.cuda.current_device())
    # The same weights for any number of ranks; perform_initialization gives Megatron's own.
    initialize_weights([model], SEED)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return model, DistributedDataParallel(config, ddp, model)


def batches(text: bytes) -> Iterator[Tensor]:
    """This rank's sequences [b, s + 1] of each step; all ranks' together do not depend on ranks."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(SEED)
    while True:
        begins = torch.randint(len(data) - SEQUENCE, (SEQUENCES,), generator=draw)
        own = begins.chunk(dist.get_world_size())[dist.get_rank()]
        rows = torch.stack([data[begin : begin + SEQUENCE + 1] for begin in own])
        yield rows.to(torch.cuda.current_device())


def forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """Megatron's schedule calls this for every micro-batch."""
    rows = next(iterator)
    positions = torch.arange(SEQUENCE, device=rows.device).expand(len(rows), -1)
    losses = model(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous())
    return losses, token_loss


def token_loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum of the losses, their number, and what is reported."""
    count = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    both = torch.stack([losses.detach().double().sum(), count.double()])
    return losses.sum(), count, {"loss": both}


def train(steps: int, text: bytes) -> list[tuple[float, float]]:
    """Train for some steps.

    Returns:
        Loss in nats and FFN share of every step, over all ranks.
    """
    model, wrapped = build()
    settings = OptimizerConfig(
        optimizer="adam", lr=2e-3, weight_decay=0.1, clip_grad=1.0, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=False)
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    schedule = get_forward_backward_func()
    data, done = batches(text), []
    for _ in range(steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        reported = schedule(
            forward_step_func=forward_step,
            data_iterator=data,
            model=[wrapped],
            num_microbatches=1,
            seq_length=SEQUENCE,
            micro_batch_size=SEQUENCES // dist.get_world_size(),
            forward_only=False,
        )
        optimizer.step()
        done.append((mean(reported[0]["loss"]), ffn_share(model)))
    return done


def mean(total_and_count: Tensor) -> float:
    """The mean over all ranks' tokens."""
    dist.all_reduce(total_and_count)
    return float(total_and_count[0] / total_and_count[1])


def ffn_share(model: GPTModel) -> float:
    """MoE++: the share of all selections since the last call that went to FFN experts."""
    layers = moe_statistics(model).values()
    counts = torch.stack([layer.selected for layer in layers if layer.selected is not None])
    total = counts.sum(dim=0)
    for layer in layers:
        layer.reset()
    dist.all_reduce(total)
    return float(total[: MOEPP.num_ffn_experts].sum() / total.sum())


def main(steps: int = 30) -> None:
    """Train on the bytes of this file."""
    start()
    done = train(steps, Path(__file__).read_bytes())
    if dist.get_rank() == 0:
        for step, (loss, share) in enumerate(done, start=1):
            if step == 1 or step % 10 == 0:
                print(f"step {step}: loss {loss:.4f}, FFN share {share:.3f}")
        print(f"FFN share under perfect balance (phi): {MOEPP.phi(MOEPP.tau):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
