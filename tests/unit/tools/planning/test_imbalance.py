"""Uneven routing as a distribution."""

import json

import numpy as np
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.tools.planning.imbalance import (
    EVEN,
    FORCED_BALANCE,
    LEARNED,
    evenness_of,
    rank_load,
    recorded_routing,
)


def test_forced_balance_and_a_single_rank_are_even():
    assert rank_load(FORCED_BALANCE, 64, 8, 1000) == EVEN
    assert rank_load(LEARNED, 64, 1, 1000) == EVEN


def test_learned_routing_is_as_uneven_as_published():
    # arXiv 2408.15664, table 2: MaxVio 0.52 of 64 experts. 400 draws know the mean to 0.01.
    load = rank_load(LEARNED, 64, 64, 10**8)
    assert load.mean == pytest.approx(1.52, abs=0.03)
    assert 1 < load.median < load.p90 < load.p99


def test_evenness_is_found_again():
    rng = np.random.default_rng(3)
    selections = 4096
    popularity = rng.dirichlet(np.full(16, 12.0), size=3000)
    shares = [rng.multinomial(selections, layer) / selections for layer in popularity]
    # The variance of 3,000 x 16 shares is known to about 1%.
    assert evenness_of(shares, selections) == pytest.approx(12.0, rel=0.06)


def test_even_shares_have_no_finite_evenness():
    assert evenness_of([[0.25] * 4], 100) == float("inf")
    for bad in ([], [[0.0, 0.0]]):
        with pytest.raises(ValueError, match="must"):
            evenness_of(bad, 100)


def line(step, shares):
    others = {"loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "balance_loss"}
    others |= {"ffn_per_token", "max_ffn_load", "dropped_fraction", "a2a_bytes"}
    content = dict.fromkeys(others, 0) | {
        "expert_share": shares,
        "step": step,
        "tokens": step * 1000,
        "ffn_fraction": 0.5,
        "layer_expert_share": [shares],
    }
    return json.dumps(content)


def test_routing_of_a_recorded_run(tmp_path):
    # Two FFN experts and a zero expert; only the later half counts.
    shares = [[0.5, 0.0, 0.5], [0.5, 0.0, 0.5], [0.3, 0.2, 0.5], [0.2, 0.3, 0.5]]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(line(step, share) for step, share in enumerate(shares, start=1))
    )
    routing = recorded_routing(tmp_path, num_ffn_experts=2, topk=2)
    # A variation of 0.2 around the mean, 1,000 selections a step: chance explains 0.001 of 0.04.
    assert routing.evenness == pytest.approx((1 / 0.039 - 1) / 2)


@pytest.mark.parametrize("content", [None, "not json", "{}", line(1, [0.5, 0.5])])
def test_a_run_without_shares_is_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="--routing"):
        recorded_routing(path, num_ffn_experts=2, topk=2)
