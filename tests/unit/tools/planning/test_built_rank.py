"""Ranks of 1,024-rank layouts, built alone, are those that the layout and the plan say."""

from dataclasses import replace

import pytest

from moepp_megatron.cli import dry_run
from moepp_megatron.config import Layout, parse_config
from moepp_megatron.tools.planning import built_rank as rank_build
from moepp_megatron.tools.planning.built_rank import check_rank
from tests.unit.tools.planning.rank_builds import WORLD, build


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
    found = elsewhere.submit(build, raw, ranks).result()
    for rank, (built, checks) in zip(ranks, found, strict=True):
        assert built.rank == rank
        # Ten groups, layers, parameters, weights, gradients, dtype, optimizer.
        assert len(checks) == 17
        assert [check for check in checks if not check.holds] == []
        assert built.aligned_bytes >= built.gradient_bytes


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
    dense = sum(one.numel for one in built[0].parameters if not one.is_expert)
    experts = sum(one.numel for one in built[0].parameters if one.is_expert)
    assert sum(one.shard for one in built) == dense + 2 * experts
    assert sum(one.mean_shard for one in built) == pytest.approx(dense + 2 * experts)


def test_what_differs_is_said(elsewhere, monkeypatch, capsys):
    config = parse_config(INTERLEAVED)
    layout = Layout.from_config(config, WORLD)
    [(built, _)] = elsewhere.submit(build, INTERLEAVED, [300]).result()
    first, *others = built.parameters
    changed = {
        "group ep": replace(built, groups=built.groups | {"ep": built.groups["ep"][::-1]}),
        "layers": replace(built, layers=[[2, 3], [10]]),
        "parameters outside FFN experts": replace(
            built, parameters=[replace(first, numel=63), *others]
        ),
        "parameters of FFN experts": replace(
            built, parameters=[one for one in built.parameters if "experts.0" not in one.name]
        ),
        "bytes of gradients": replace(built, gradient_bytes=0),
        "dtype": replace(built, parameters=[replace(first, dtype="float32"), *others]),
        "bytes of optimizer state, mean of its shards": replace(built, mean_shard=1.0),
    }
    monkeypatch.setenv("COLUMNS", "200")
    for name, other in changed.items():
        assert name in [one.name for one in check_rank(config, layout, other) if not one.holds]
        monkeypatch.setattr(rank_build, "build_rank", lambda *args, other=other: other)
        assert not dry_run.build_and_check(config, layout, 300)
        assert "DIFFERS" in capsys.readouterr().out
    monkeypatch.setattr(rank_build, "build_rank", lambda *args: built)
    assert dry_run.build_and_check(config, layout, 300)
    assert "DIFFERS" not in capsys.readouterr().out
