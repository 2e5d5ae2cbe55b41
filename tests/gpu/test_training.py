"""Training on one card and on two, against one CPU process: losses, gradients, routing.

Tolerance. fp32 without TF32 (torch's default): the CPU and the card add up in another order and
take another exponential, unit roundoff 6e-8 over sums of up to a few thousand terms, 4e-6 in a
step. Adam divides gradients by their own size, so a step hands a relative error on to the weights,
and five steps may add theirs up: 1e-4 leaves a factor of five. Selections must be the same to the
last one.
"""

import pytest

from tests.gpu.program import on_ranks
from tests.gpu.runs import train_on_device, train_on_one_half, train_with_graphs
from tests.parallel.training_runs import (
    CP2,
    EP2,
    PP2,
    TP2,
    assemble,
    compare,
    difference,
    settings,
    train,
)
from tests.te_stand_in.models import RECIPES

pytestmark = pytest.mark.gpu

FP32, STEPS = 1e-4, 5
# A graph runs the kernels of the same model; sums of gradients that meet in it change their order.
GRAPHS = 1e-5
# bf16 rounds by 2^-9; four layers of some ten roundings each, most of which cancel out in a loss.
BF16_LOSS = 2**-5


def run_of(function, raw, steps=STEPS, **options):
    """The run of ranks of their own, and what else the first of them returns."""
    results = on_ranks(function, raw, steps, **options)
    return assemble([(run, pieces) for run, pieces, *_ in results]), results[0][2:]


def trained(steps=STEPS, nproc=1, transformer_engine=False, **sections):
    options = {"nproc": nproc, "transformer_engine": transformer_engine}
    return run_of(train_on_device, settings(**sections), steps, **options)[0]


def test_five_steps_equal_those_on_a_cpu(card, ranks):
    raw = settings(moe={"fused": "auto"})
    reference = assemble(ranks(1).run(train, raw, STEPS))
    run, (device,) = run_of(train_on_device, raw)
    assert device == card.type
    compare(run, reference, FP32)


def test_fused_kernels_train_like_plain_operations(cuda):
    plain, fused = (trained(moe={"fused": fused}) for fused in (False, True))
    compare(plain, fused, FP32)


def test_transformer_engine_trains_alike(real_transformer_engine):
    """bf16, its modules against megatron-core's: the losses, for routing may differ by rounding."""
    own, engines = (
        trained(precision={"dtype": "bf16"}, transformer_engine=engine) for engine in (False, True)
    )
    assert difference(engines, own).loss < BF16_LOSS


@pytest.mark.parametrize("parts", [["attn"], ["moe_router"], ["attn", "moe_router"]], ids="+".join)
def test_cuda_graphs_train_like_the_model(cuda, parts):
    runs = []
    for graphs in ([], parts):
        raw = settings(training={"cuda_graphs": graphs}, moe={"layer_freq": [1, 0, 1, 1]})
        run, (captured,) = run_of(train_with_graphs, raw)
        # Attention in four layers, the router in three; one graph a micro-batch or more.
        assert captured >= 4 * ("attn" in graphs) + 3 * ("moe_router" in graphs)
        runs.append(run)
    compare(runs[1], runs[0], GRAPHS)


def test_cuda_graphs_with_transformer_engine(real_transformer_engine):
    runs = []
    for graphs in ([], ["attn", "moe_router"]):
        raw = settings(training={"cuda_graphs": graphs}, precision={"dtype": "bf16"})
        run, (captured,) = run_of(train_with_graphs, raw, transformer_engine=True)
        assert captured >= 8 * bool(graphs)
        runs.append(run)
    assert difference(runs[1], runs[0]).loss < BF16_LOSS


LAYOUTS = {
    "data parallel": {"use_distributed_optimizer": True},
    "expert parallel": EP2,
    "tensor parallel": TP2,
    "pipeline": PP2,
    "context parallel": CP2,
}


@pytest.mark.parametrize(
    ("layout", "dispatcher"),
    [
        *((layout, "alltoall") for layout in LAYOUTS),
        ("expert parallel", "alltoall_dedup"),
        ("expert parallel", "allgather"),
    ],
)
def test_two_cards_equal_one_cpu_process(two_cards, ranks, layout, dispatcher):
    reference = assemble(ranks(1).run(train, settings(), 3))
    run = trained(3, 2, parallel=LAYOUTS[layout], moe={"dispatcher": dispatcher})
    compare(run, reference, FP32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_rank_without_a_row_in_fp8(two_cards, transformer_engine, recipe):
    """It pads nothing, multiplies nothing, and reduces its amaxes with the others all the same."""
    runs = []
    for precision in ({}, {"fp8": "hybrid", "fp8_recipe": recipe}):
        raw = settings(
            moe={"num_zero_experts": 2}, parallel=EP2, precision={"dtype": "bf16", **precision}
        )
        run, _ = run_of(train_on_one_half, raw, 3, nproc=2, transformer_engine=True)
        runs.append(run)
    assert runs[1].routing[0]["ffn_fraction"] == 1.0
    # As in test_fp8: a loss averages over many errors of 0.06.
    assert difference(runs[1], runs[0]).loss < 0.1
    assert runs[1].losses != runs[0].losses


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_flex_trains_like_the_all_to_all(deepep, backend):
    """bf16, the one format of DeepEP's kernels; hidden size 128, the least that they take."""
    from moepp_megatron.runtime.optional import flex_backends

    if backend not in flex_backends():
        pytest.skip(f"needs DeepEP with {backend}")
    others = {"model": {"hidden_size": 128}, "precision": {"dtype": "bf16"}, "parallel": EP2}
    plain, flex = (
        trained(nproc=2, moe=moe, **others)
        for moe in ({"dispatcher": "alltoall"}, {"dispatcher": "flex", "flex_backend": backend})
    )
    assert difference(flex, plain).loss < BF16_LOSS
