"""The golden checkpoints of the released code, converted and scored in every kind of layout."""

import numpy as np
import pytest

from tests.interop.checkpoints import CASES, GOLDEN, convert_and_score

# The contract with the released code's numbers.
LOGITS = 1e-4

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
LAYOUTS = {
    "1 rank": (1, []),
    "tp2": (2, [TP2]),
    "tp2 ep2 dp2": (4, [TP2, EP2]),
    "tp2 etp2 cp2": (4, [TP2, CP2, "parallel.expert_tensor_parallel_size=2"]),
    "ep4": (4, ["parallel.expert_model_parallel_size=4"]),
}
# Four layers share out evenly over stages; the other case's three do not.
PIPELINES = {
    "pp2 ep2": (4, [PP2, EP2]),
    "tp2 pp2": (4, [TP2, PP2]),
    "pp2 vpp2": (2, [PP2, "parallel.virtual_pipeline_model_parallel_size=2"]),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for case in CASES for layout in LAYOUTS]
    + [("two_layer_gate", layout) for layout in PIPELINES],
)
def test_scores(ranks, tmp_path, case, layout):
    world_size, overrides = (LAYOUTS | PIPELINES)[layout]
    expected = np.load(GOLDEN / case / "expected.npz")
    tokens = GOLDEN / case / "expected.npz"
    scores = ranks(world_size).run(
        convert_and_score, GOLDEN / case, tmp_path / "checkpoint", tokens, overrides
    )
    assert all(other is None for other in scores[1:])
    for name in ("logits", "token_logprobs"):
        np.testing.assert_allclose(scores[0][name], expected[name], rtol=0, atol=LOGITS)


def routing_of_golden(case, folder):
    """Router logits, selections and gates [tokens, experts] of every layer."""
    from moepp_megatron.interop import scoring
    from moepp_megatron.moe.layer import MoEPPLayer
    from tests.interop.checkpoints import hf_to_mcore, score

    hf_to_mcore(GOLDEN / case, folder)
    routed = []
    build = scoring.build_model

    def build_watched(config):
        models = build(config)
        layers = [m for model in models for m in model.modules() if isinstance(m, MoEPPLayer)]
        for layer in layers:
            layer.router.register_forward_hook(
                lambda module, inputs, routing: routed.append(
                    (routing.logits[:, 0], routing.routing_map, routing.gates)
                )
            )
        return models

    scoring.build_model = build_watched
    try:
        score(folder, GOLDEN / case / "expected.npz", [])
    finally:
        scoring.build_model = build
    # One sequence a micro-batch: all layers of the first sequence, then of the second.
    half = len(routed) // 2
    return [
        tuple(np.concatenate(pair) for pair in zip(*both, strict=True))
        for both in zip(routed[:half], routed[half:], strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_routing_of_every_layer(on_one_rank, tmp_path, case):
    expected = np.load(GOLDEN / case / "expected.npz")
    layers = on_one_rank(routing_of_golden, case, tmp_path / "checkpoint")
    assert len(layers) == sum(name.endswith("_router_logits") for name in expected)
    # A kind of expert that nothing selects would pass whatever it computed.
    assert sum(selected.sum(axis=0) for _, selected, _ in layers).all()
    for number, (logits, selected, gates) in enumerate(layers):
        np.testing.assert_allclose(
            logits, expected[f"layer{number}_router_logits"], rtol=0, atol=LOGITS
        )
        np.testing.assert_array_equal(selected, expected[f"layer{number}_selected"])
        np.testing.assert_allclose(gates, expected[f"layer{number}_gates"], rtol=0, atol=1e-5)
