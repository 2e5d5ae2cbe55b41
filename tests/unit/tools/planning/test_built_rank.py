"""Ranks of 1,024-rank layouts, built alone, are those that the layout and the plan say."""

from dataclasses import replace

import pytest

from moepp_megatron.config import Layout, parse_config
from tests.unit.tools.planning.rank_builds import WORLD, build, differences


def settings(parallel, **sections):
    raw = {
        "run": {"dir": "runs/test"},
        "model": {
            "num_layers": 16,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 8,
            "seq_length": 128,
            "vocab_size": 512,
        },
        "moe": {"num_ffn_experts": 16},
        "precision": {"dtype": "bf16"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 10, "global_batch_size": 1024, "micro_batch_size": 1},
        "parallel": parallel,
    }
    for name, changes in sections.items():
        raw[name] |= changes
    return raw


INTERLEAVED = settings(
    {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 8,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
)
SPLIT_EXPERTS = settings(
    {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 8,
        "pipeline_model_parallel_layout": "Et|(ttt|)*2ttt|(tt|)*3L",
        "expert_model_parallel_size": 16,
        "expert_tensor_parallel_size": 2,
        "use_distributed_optimizer": False,
    },
    moe={
        "shared_expert_ffn_hidden_size": 32,
        "shared_expert_gate": True,
        "two_layer_gate": True,
        "layer_freq": 2,
    },
    model={"num_query_groups": 4, "qk_layernorm": True, "qkv_bias": True, "tie_embeddings": True},
    precision={"dtype": "fp32"},
)

ONE_V = settings(
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 8},
    moe={"constants_shared": True, "layer_freq": 2, "num_constant_experts": 3},
    model={"num_query_groups": 1, "qk_layernorm": True, "qk_layernorm_scope": "all_heads"},
    precision={"grad_reduce_in_fp32": False},
)
FURTHER = settings(
    {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 4,
        "expert_model_parallel_size": 8,
    },
    model={"mtp_num_layers": 2},
)
# The last layer is dense, and with it those of multi-token prediction.
FURTHER_DENSE = FURTHER | {"moe": FURTHER["moe"] | {"layer_freq": 2}}


@pytest.mark.parametrize(
    ("raw", "ranks"),
    [
        (INTERLEAVED, [0, 300, 700, 1023]),
        (SPLIT_EXPERTS, [1, 500, 1022]),
        (ONE_V, [0, 1001]),
        (FURTHER, [0, 1023]),
        (FURTHER_DENSE, [1023]),
    ],
    ids=["interleaved", "split experts", "one V", "further tokens", "dense further tokens"],
)
def test_ranks_are_what_the_layout_says(elsewhere, raw, ranks):
    for built, found in elsewhere.submit(build, raw, ranks).result():
        assert found == {}
        assert built.aligned >= built.gradients


def test_shards_of_all_ranks_are_all_parameters(elsewhere):
    layout = {
        "tensor_model_parallel_size": 8,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 16,
        "expert_model_parallel_size": 16,
    }
    # The 8 ranks of a data-parallel group hold experts 0 in turn with experts 8, four of each.
    ranks = list(range(0, 64, 8))
    built = [one for one, _ in elsewhere.submit(build, settings(layout), ranks).result()]
    assert built[0].groups["dp"] == ranks
    whole = built[0].dense + 2 * built[0].experts
    assert sum(one.shard for one in built) == whole
    assert sum(one.mean_shard for one in built) == pytest.approx(whole)


def test_what_differs_is_found(elsewhere):
    config = parse_config(INTERLEAVED)
    layout = Layout.from_config(config, WORLD)
    [(built, _)] = elsewhere.submit(build, INTERLEAVED, [300]).result()
    changed = {
        "ep": {"groups": built.groups | {"ep": built.groups["ep"][::-1]}},
        "layers": {"layers": [[2, 3], [10]]},
        "parameters outside FFN experts": {"dense": built.dense + 1},
        "parameters of FFN experts": {"experts": 0},
        "bytes of weights": {"weights": 0},
        "bytes of gradients": {"gradients": 0},
        "dtypes": {"dtypes": {"float32"}},
        "bytes of optimizer state, mean of its shards": {"mean_shard": 1.0},
    }
    for name, change in changed.items():
        assert [*differences(config, layout, 300, replace(built, **change))] == [name]
