"""A run is scored on one rank whatever it was trained with."""

import pytest

from moepp_megatron.config import check_config, load_config, with_overrides
from moepp_megatron.config.schema.megatron import MegatronSection
from moepp_megatron.training.inference_settings import FORWARD_ONLY
from tests import ROOT

QUICKSTART = ROOT / "configs/quickstart.yaml"
EP2 = ["parallel.expert_model_parallel_size=2", "precision.dtype=bf16"]


@pytest.mark.parametrize(
    "trained_with",
    [
        [*EP2, "moe.dispatcher=flex", "moe.flex_backend=hybridep", "moe.flex_num_sms=24"],
        [
            *EP2,
            "parallel.overlap_moe_expert_parallel_comm=true",
            "megatron.high_priority_a2a_comm_stream=true",
        ],
        ["training.cuda_graphs=[attn, moe_router]"],
        ["training.batch_ramp=[[0, 8], [8192, 16]]"],
        ["routes.record=routes", "routes.steps=2"],
    ],
)
def test_settings_of_training_alone_are_dropped(trained_with):
    trained = load_config(QUICKSTART, trained_with)
    config = with_overrides(trained, FORWARD_ONLY)
    assert config.moe.dispatcher == "alltoall"
    assert not config.training.cuda_graphs
    assert config.training.batch_ramp is None
    assert config.megatron == MegatronSection()
    assert not config.routes.enabled
    assert not config.parallel.overlap_moe_expert_parallel_comm
    assert [notice for notice in check_config(config) if "flex" in notice] == []
