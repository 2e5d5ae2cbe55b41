"""Training with attention and router as CUDA graphs: steps, micro-batches, stages, reductions."""

import pytest

from tests.parallel.training_runs import (
    EP2,
    LATENT,
    PP2,
    STEPS,
    compare,
    short,
    train,
)


def train_with_graphs(raw, steps):
    """As `train`; fails unless every graph was replayed in all steps but the first."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    from tests.graph_recorder import cpu_graphs, graphs_of

    # The tracker of a GPU run keeps generators, which a CPU rank has none of.
    initialize_rng_tracker()
    built = []
    with cpu_graphs():
        result = train(raw, steps, built.extend)
        graphs = [graph for model in built for graph in graphs_of(model)]
        assert len(graphs) > 0
        assert min(graph.replays for graph in graphs) >= steps - 1
    return result


def train_with_experts(raw, steps, replays):
    """As `train`, with the products of a GPU; all graphs are replayed so often."""
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    from moepp_megatron.moe import spec
    from moepp_megatron.moe.local_experts import GroupedExperts
    from tests.graph_recorder import cpu_graphs, graphs_of

    initialize_rng_tracker()
    built = []
    with pytest.MonkeyPatch.context() as patch, cpu_graphs():
        patch.setattr(GroupedExperts, "suits", spec.CPUExperts.suits)
        patch.setattr(spec, "CPUExperts", GroupedExperts)
        result = train(raw, steps, built.extend)
        graphs = [graph for model in built for graph in graphs_of(model)]
        assert {graph.replays for graph in graphs} <= {replays}
        assert (len(graphs) > 0) == bool(raw["training"]["cuda_graphs"])
    return result


@pytest.mark.parametrize("layout", ["data parallel", "pipeline"])
@pytest.mark.parametrize(
    ("parts", "factor", "replays"),
    [(["attn", "moe"], 4.0, 2), (["attn", "moe"], 0.2, 0), (["attn", "moe_router"], 4.0, 2)],
)
def test_experts_with_static_rows_are_captured(trained, layout, parts, factor, replays):
    """Without a replay where the first step's rows overflow: it is repeated, others have none."""
    sections = {
        "parallel": {"pipeline": PP2, "data parallel": {}}[layout],
        "moe": {"static_rows": factor, "shared_expert_ffn_hidden_size": 24},
    }
    runs = []
    for graphs in (parts, []):
        raw = short(**sections, training={"cuda_graphs": graphs})
        runs.append(trained(2, raw, STEPS + 1, replays, how=train_with_experts))
    compare(*runs, 1e-6)
    assert runs[0].repeated == [int(factor < 1.0)] * (STEPS + 1)
    assert runs[0].fills == runs[1].fills


def with_and_without(trained, sections):
    """A run with graphs, which the second step replays in both directions, and one without."""
    graphs = {"cuda_graphs": ["attn", "moe_router"]}
    run = trained(2, short(**sections, training=graphs), how=train_with_graphs)
    return run, trained(2, short(**sections))


LAYOUTS = {
    "expert parallel, overlapped": {
        **EP2,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
    "pipeline": PP2,
    "interleaved": {**PP2, "virtual_pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("expert parallel, overlapped", "fp32"), ("interleaved", "fp32"), ("pipeline", "bf16")],
)
def test_training_equals_that_without_graphs(trained, layout, dtype):
    """To a few units in the last place: a graph sums gradients that meet in it in its own order."""
    sections = {
        "parallel": LAYOUTS[layout],
        "precision": {"dtype": dtype},
        "moe": {"layer_freq": [1, 0, 1, 1]},
        "model": {"num_layers": 4},
    }
    compare(*with_and_without(trained, sections), 1e-6)


@pytest.mark.parametrize("layout", ["expert parallel, overlapped", "pipeline"])
def test_latent_attention_is_captured(trained, layout):
    sections = {"parallel": LAYOUTS[layout], "model": LATENT}
    compare(*with_and_without(trained, sections), 1e-6)
