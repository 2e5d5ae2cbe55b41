"""The settings that megatron-core gets for the process groups that it makes."""

import inspect
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from moepp_megatron.config import Layout, parse_config
from moepp_megatron.config.schema.parallel import ParallelSection
from moepp_megatron.runtime.distributed import build_groups
from tests.parallel.training_runs import settings


@pytest.mark.parametrize(("backend", "given"), [("nccl", ["ep", "ep_dp"]), ("gloo", None)])
def test_groups_of_high_priority_are_nccls(monkeypatch, backend, given):
    told = {}
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **kw: told.update(kw))
    monkeypatch.setattr(megatron_random, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    groups = {"high_priority_stream_groups": ["ep", "ep_dp"]}
    config = parse_config(settings(parallel={"expert_model_parallel_size": 2, **groups}))
    build_groups(config, Layout.from_config(config, 2))
    assert told["high_priority_stream_groups"] == given


def test_megatron_core_makes_groups_of_these_names():
    """It takes a name that it does not know without a word."""
    field = ParallelSection.model_fields["high_priority_stream_groups"]
    (choices,) = get_args(field.annotation)
    source = inspect.getsource(parallel_state.initialize_model_parallel)
    for name in get_args(choices):
        assert f'get_nccl_options("{name}"' in source, name
