"""From the user's configuration to the settings that the layers are built from."""

from pathlib import Path

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.model.megatron_config import moepp_config, transformer_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_any_topk_gives_a_configuration(topk):
    config = load_config(QUICKSTART, [f"moe.router_topk={topk}"])
    assert transformer_config(config).moe_router_topk == topk
    assert moepp_config(config).router_topk == topk
