"""Optimizers and groups of parameters: the same in every layout, resumed bit for bit."""

import pytest

from moepp_megatron.training.checkpoint.files import checkpoint_name
from tests.parallel.checkpoint_runs import logged, run_trainer, train_between, trainer_settings
from tests.parallel.training_runs import EP2, PP2, TP2, begin_training, compare, short

pytest.importorskip("emerging_optimizers", reason="needs moepp-megatron[emerging]")
MUON = {"kind": "muon", "muon_fp32_matmul_prec": "highest", "muon_extra_scale_factor": 0.2}
LION = {"kind": "lion", "lr": 1.0e-4}
PLAIN = {"use_distributed_optimizer": False}
BF16 = {"precision": {"dtype": "bf16"}}


def kinds_of(raw):
    """Each parameter's kind, and the class of the optimizer that trains it."""
    from moepp_megatron.training.optimizers import _parameter_kind

    _, _, model = begin_training(raw)
    owners = {
        parameter: type(part.optimizer).__name__
        for part in model.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    }
    return {
        name: (_parameter_kind(parameter, name), owners[parameter])
        for name, parameter in model.chunks[0].named_parameters()
    }


@pytest.mark.parametrize("kind", ["muon", "lion"])
def test_matrices_alone_go_to_the_optimizer_that_was_named(on_one_rank, kind):
    optimizer = {"kind": kind}
    model = {"qk_layernorm": True, "qkv_bias": True}
    moe = {"shared_expert_ffn_hidden_size": 16, "shared_expert_gate": True}
    raw = short(optimizer=optimizer, parallel=PLAIN, model=model, moe=moe)
    found = on_one_rank(kinds_of, raw)
    own = {"muon": "TensorParallelMuon", "lion": "Lion"}[kind]
    assert {owner for part, owner in found.values() if part == "matrices"} == {own}
    assert {owner for part, owner in found.values() if part != "matrices"} == {"AdamW"}
    parts = {part for part, _ in found.values()}
    assert parts == {"matrices", "router", "constants", "embeddings", "norms_and_biases"}
    for name, (part, _) in found.items():
        assert (part == "matrices") == name.endswith(
            ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
        ), name


# Orthogonalization amplifies the rounding of gradients (its singular values go to 1, however
# small they were), and steps follow each other.
SAME = 2e-4
LAYOUTS = {
    "dp2": (2, {}, {}),
    "tp2": (2, TP2, {}),
    # On one rank there is nothing that the other way of taking a matrix apart could change.
    "tp2 distributed": (
        2,
        TP2 | {"expert_tensor_parallel_size": 2},
        {"muon_tp_mode": "distributed"},
    ),
    "pp2 ep2": (4, EP2 | PP2, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_muon_is_the_same_in_every_layout(trained, alone, layout):
    world_size, parallel, changes = LAYOUTS[layout]
    optimizer = MUON | {"lr": 1.0e-3}
    raw = short(optimizer=optimizer | changes, parallel=PLAIN | parallel)
    run = trained(world_size, raw)
    compare(run, alone(short(optimizer=optimizer, parallel=PLAIN)), SAME)


@pytest.mark.parametrize(
    ("kind", "world_size", "sections"),
    [
        (MUON, 1, {"parallel": PLAIN}),
        (MUON, 2, {"parallel": TP2} | BF16),
        (MUON, 2, {"parallel": EP2} | BF16),
        (LION, 1, {"parallel": PLAIN}),
    ],
    ids=["muon", "muon tp2 bf16", "muon layer-wise ep2 bf16", "lion"],
)
def test_two_and_two_steps_are_four(ranks, corpus, tmp_path, kind, world_size, sections):
    checkpoint = {"save_interval": 2, "load": "auto"}

    def run(name, steps, **more):
        training = {"train_iters": steps, "global_batch_size": 4, "micro_batch_size": 2}
        optimizer = kind | {"warmup_iters": 0}
        raw = trainer_settings(
            corpus, tmp_path / name, training=training, optimizer=optimizer, **sections, **more
        )
        ranks(world_size).run(run_trainer, raw)

    run("whole", 4)
    run("run", 2, checkpoint=checkpoint)
    run("run", 4, checkpoint=checkpoint)
    for key in ("loss", "grad_norm"):
        assert logged(tmp_path / "run", key) == logged(tmp_path / "whole", key)


def test_matrices_shared_out_are_those_that_are_not(ranks, tmp_path):
    """bf16 on two ranks: layer-wise, every rank a copy, and one resumed as the other."""
    shared = short(optimizer=MUON, **BF16)
    copies = short(optimizer=MUON, parallel=PLAIN, **BF16)
    whole = ranks(2).run(train_between, shared, tmp_path / "whole", 4)[0]
    first = ranks(2).run(train_between, shared, tmp_path / "first", 2)[0]
    assert first == whole[:2]
    start = tmp_path / "first" / checkpoint_name(2)
    assert ranks(2).run(train_between, shared, tmp_path / "shared", 4, start)[0] == whole[2:]
    # Copies sum the gradient norm in another order (1e-7 of it in the first step), which may round
    # a bf16 weight to its neighbour: unbroken runs of both have the same losses for five steps, and
    # differ by 4e-5 in the sixth. One rank sums gradients in another order as well.
    for name, size, tolerance in (("copies", 2, 2e-4), ("alone", 1, 2e-3)):
        rest = ranks(size).run(train_between, copies, tmp_path / name, 4, start)[0]
        assert rest == pytest.approx(whole[2:], rel=tolerance), name


GROUPS = {
    "router": {"lr_mult": 0.5, "weight_decay": 0.0},
    "constants": {"lr_mult": 2.0},
    "embeddings": {"weight_decay": 0.0},
    "norms_and_biases": {"weight_decay": 0.05},
}


def rates_of(raw):
    """The run's rate, and rate and weight decay of each kind of parameters in the second step."""
    from moepp_megatron.training.optimizers import _parameter_kind

    _, _, model = begin_training(raw)
    model.scheduler.step(increment=2)
    names = {parameter: name for name, parameter in model.chunks[0].named_parameters()}
    found = {}
    for group in model.optimizer.param_groups:
        for parameter in group["params"]:
            kind = _parameter_kind(parameter, names[parameter])
            kind += " vector" if parameter.dim() == 1 else ""
            found.setdefault(kind, set()).add((group["lr"], group["weight_decay"]))
    return model.learning_rate, found


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_kinds_of_parameters_have_their_own_rates(on_one_rank, kind):
    optimizer = {"kind": kind, "lr": 1.0e-3, "weight_decay": 0.1, "decay_style": "constant"}
    model = {"qk_layernorm": True}
    plain = short(optimizer=optimizer, parallel=PLAIN, model=model)
    rate, found = on_one_rank(rates_of, plain)
    assert rate == 1.0e-3
    assert found == {
        "matrices": {(1.0e-3, 0.1)},
        "router": {(1.0e-3, 0.1)},
        "constants": {(1.0e-3, 0.1)},
        "embeddings": {(1.0e-3, 0.1)},
        "norms_and_biases vector": {(1.0e-3, 0.0)},
    }
    changed = short(optimizer=optimizer | {"groups": GROUPS}, parallel=PLAIN, model=model)
    rate, found = on_one_rank(rates_of, changed)
    assert rate == 1.0e-3
    assert found == {
        "matrices": {(1.0e-3, 0.1)},
        "router": {(5.0e-4, 0.0)},
        "constants": {(2.0e-3, 0.1)},
        "embeddings": {(1.0e-3, 0.0)},
        "norms_and_biases vector": {(1.0e-3, 0.05)},
    }


@pytest.mark.parametrize("parallel", [EP2, TP2], ids=["ep2", "tp2"])
def test_groups_are_the_same_in_every_layout(trained, alone, parallel):
    """With the distributed optimizer, as by default."""
    optimizer = {"groups": GROUPS}
    expected = alone(short(optimizer=optimizer))
    assert expected.losses[-1] != alone(short()).losses[-1]
    raw = short(optimizer=optimizer, parallel=parallel)
    # fp32 sums over other ranks.
    compare(trained(2, raw), expected, 1e-5)


def test_groups_are_resumed(ranks, tmp_path):
    raw = short(optimizer={"groups": GROUPS}, parallel=EP2)
    whole = ranks(2).run(train_between, raw, tmp_path / "whole", 3)[0]
    first = ranks(2).run(train_between, raw, tmp_path / "first", 1)[0]
    start = tmp_path / "first" / checkpoint_name(1)
    # Two steps: the second loss follows from the weights and the optimizer's state.
    rest = ranks(2).run(train_between, raw, tmp_path / "rest", 3, start)[0]
    assert first + rest == whole
