"""Parameters that `--dry-run` prints are those that ranks hold."""

import pytest

from tests.parallel.layouts import parse_cells, run_settings
from tests.parallel.training_runs import EP2, begin, settings

CELLS = parse_cells("""
    1 tied
    4 tp2 pp2 ep2 shared mixed
    4 pp4 ends-apart tied two-layers
    4 tp2 pp2 ep2 uneven-interleaved gqa
    4 ep2 etp2 whole bf16
    2 cp2 vanilla bf16
""")


def held(raw):
    """Return this rank's report; parameters outside and in FFN experts, optimizer bytes."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.tools.planning.memory import rank_memory
    from moepp_megatron.training.setup import build_training_model

    config, layout = begin(raw)
    model = build_training_model(config)
    sizes = [0, 0]
    for chunk in model.models:
        for name, parameter in chunk.named_parameters():
            parameter.main_grad.fill_(1.0)
            sizes[".mlp.experts." in name] += parameter.numel()
    model.optimizer.step()
    state = 0
    for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                moments = optimizer.optimizer.state[parameter]
                state += sum(
                    value.numel() * value.element_size()
                    for value in moments.values()
                    if torch.is_tensor(value) and value.numel() == parameter.numel() > 1
                )
                if config.precision.dtype == "bf16":
                    state += parameter.numel() * parameter.element_size()
    place = layout.coordinates(dist.get_rank())
    return rank_memory(config, layout, place.pp), tuple(sizes), state


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_ranks_hold_what_is_printed(ranks, cell):
    results = ranks(cell.ranks).run(held, run_settings(cell))
    for said, (dense, experts), _ in results:
        assert (said.dense, said.experts) == (dense, experts)
        assert said.gradients == 4 * (dense + experts)
    # The shards of the distributed optimizer are as even as whole buckets allow.
    optimizer = sum(state for *_, state in results)
    assert optimizer == pytest.approx(sum(said.optimizer for said, *_ in results), rel=0.01)


def test_muon_keeps_one_moment_of_a_matrix(ranks):
    pytest.importorskip("emerging_optimizers", reason="needs moepp-megatron[emerging]")
    raw = settings(
        optimizer={"kind": "muon"},
        precision={"dtype": "bf16"},
        parallel=EP2,
        moe={"shared_expert_ffn_hidden_size": 16},
    )
    results = ranks(2).run(held, raw)
    # Whole matrices are shared out, so only the sum over ranks is exact.
    state = sum(state for *_, state in results)
    assert state == sum(said.optimizer for said, *_ in results)
    assert state < 12 * sum(said.dense / 2 + said.experts for said, *_ in results)
