"""Steps without Transformer Engine: no shape, device or collective is wrong, no read is new."""

import pytest

from tests.fake_gpu import cases, reads
from tests.fake_gpu.outcomes import excess, sound, token_id_kernels

pytestmark = pytest.mark.timeout(900)

FAULTY = [cases.smallest("model.num_layers=1", parts=[part]) for part in ("plant", "plant read")]


@pytest.fixture(scope="module")
def local(play):
    """Play, without Transformer Engine and in one process, `cases.LOCAL` and `FAULTY`."""
    outcomes = play([*cases.LOCAL.values(), *FAULTY])
    return outcomes[: -len(FAULTY)], outcomes[-len(FAULTY) :]


def test_local_modules(local):
    outcomes = dict(zip(cases.LOCAL, sound(local[0]), strict=True))
    modules = {name: outcome["modules"] for name, outcome in outcomes.items()}
    for name in ("one rank", "vanilla"):
        assert modules[name] == ["CausalAttention", "GroupedExperts"]
    context = modules["capacity, context parallel"]
    assert context == ["ContextParallelAttention", "GroupedExperts"]
    tables = {
        "all-gather": (reads.ALL_GATHER, reads.PERMUTATION),
        "deduplicated": (reads.DEDUPLICATED,),
        "static rows": (),
        "static rows, expert parallel": (),
        "static rows, graphs": (),
        "static rows, graphs, expert parallel": (),
        "DeepEP": (reads.DEEPEP,),
        "HybridEP": (reads.HYBRIDEP,),
        "HybridEP, a part of a chunk": (reads.HYBRIDEP, reads.UNEVEN),
    }
    for name, outcome in outcomes.items():
        layer = tables.get(name, (reads.ALL_TO_ALL,))
        if "recompute" in name:
            outcome["layers"] *= 2
        assert excess(outcome, layer) == {}, name
    saved = outcomes["guards, budget, health, evaluation, save"]["saved"]
    # Copies of the weights in fp32 and, today, bf16; two moments.
    parameters = outcomes["one rank"]["parameters"]
    assert 12 * parameters <= saved < 14.1 * parameters
    launches = outcomes["one rank"]["launches"]
    layers = outcomes["one rank"]["layers"]
    assert layers == 4
    # Forward and backward of the loss, in each of the two layers' micro-batches.
    for name in ("_moepp_reduce_logits", "_moepp_write_loss_gradient"):
        assert launches.pop(name) == layers / 2
    # Forward and backward of router, counts by tags, numbering of rows, combine.
    assert launches == dict.fromkeys(launches, layers)
    assert len(launches) == 8
    # What the package starts a layer, next to loss, tags and the step itself; and all of it.
    assert outcomes["one rank"]["owners"]["this package"] <= 74 * layers + token_id_kernels(layers)
    assert outcomes["one rank"]["kernels"] <= 194 * layers + token_id_kernels(layers)


def test_what_would_fail_on_a_gpu_fails_here(local):
    """A tensor that is left on the host, and a read that nobody knows of."""
    on_host, read = local[1]
    assert "found at least two devices, cuda:0 and cpu" in on_host["error"], on_host["error"]
    (new,) = excess(*sound([read]), (reads.ALL_TO_ALL,))
    assert new.startswith("item moepp_megatron/moe/")
