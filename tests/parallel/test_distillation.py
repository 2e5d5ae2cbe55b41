"""A teacher beside the text: the same loss and gradients in every layout, and what is refused."""

from unittest import mock

import numpy as np
import pytest

from moepp_megatron.config import ConfigError, parse_config
from moepp_megatron.features.distillation import teacher
from tests.parallel.checkpoint_runs import (
    logged,
    run_trainer,
    train_between,
    trainer_of,
    trainer_settings,
)
from tests.parallel.test_expert_overlap import STAGES, both
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    TP2,
    VANILLA,
    begin,
    compare,
    difference,
    part_of,
    settings,
    short,
    train,
)
from tests.refusals import config_error

TOKENS, COLUMNS = 6, 20
# As in test_cross_entropy.py: a dozen fp32 operations, and sums in another order.
FP32, LAYOUT = 5e-6, 1e-5


def divergence_of_shares(temperature, top_k, reverse):
    """Divergence and gradient of this rank's columns, ours and torch's in fp64."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from moepp_megatron.features.distillation.part import _kl_divergence

    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    logits, teacher = 4.0 * torch.randn(2, TOKENS, 1, size * COLUMNS)
    grad = torch.rand(TOKENS, 1)
    grad[2] = 0.0
    own = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
    share = logits[..., own].clone().requires_grad_()
    kind = (group, temperature, top_k, reverse)
    found = _kl_divergence(share * 1, teacher[..., own].clone(), *kind)
    found.backward(grad)

    whole = logits.double().requires_grad_()
    q, p = whole / temperature, teacher.double() / temperature
    if top_k is not None:
        places = teacher.topk(top_k).indices
        q, p = q.gather(-1, places), p.gather(-1, places)
    of, to = (q, p) if reverse else (p, q)
    terms = F.kl_div(to.log_softmax(-1), of.log_softmax(-1), reduction="none", log_target=True)
    wanted = terms.sum(-1) * temperature**2
    wanted.backward(grad.double())
    same = _kl_divergence(share.detach(), share.detach().clone(), *kind)
    return {
        "ours": (found.detach().numpy(), share.grad.numpy()),
        "fp64": (wanted.detach().numpy(), whole.grad[..., own].numpy()),
        "same": same.numpy(),
    }


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (2.5, 3), (2.5, 20)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_the_vocabulary(ranks, size, temperature, top_k, reverse):
    for result in ranks(size).run(divergence_of_shares, temperature, top_k, reverse):
        for actual, expected in zip(result["ours"], result["fp64"], strict=True):
            np.testing.assert_allclose(actual, expected, rtol=FP32, atol=FP32)
        assert result["fp64"][0].min() > 0.1
        # Four ranks may add up the same numbers in two orders: last bits of a logarithm of 4 to 8,
        # times the temperature's square.
        rounding = 1e-6 * temperature**2 if size == 4 else 0.0
        np.testing.assert_allclose(result["same"], 0.0, atol=rounding)


@pytest.fixture(scope="module")
def teachers(ranks, tmp_path_factory):
    """Checkpoints: the students' own shape, other depths, and one without new experts."""
    folder = tmp_path_factory.mktemp("teachers")
    shapes = {
        "same": {"moe": {"gating_residual": True}},
        "deeper": {"model": {"num_layers": 4}},
        "further": {"model": {"num_layers": 3, "mtp_num_layers": 1}},
        "vanilla": {"model": {"num_layers": 4}, "moe": VANILLA | {"num_ffn_experts": 4}},
    }
    for name, sections in shapes.items():
        raw = short(**sections, training={"seed": 11})
        ranks(1).run(train_between, raw, folder / name, 0)
    return {name: folder / name for name in shapes}


def taught(teacher, kind=None, **sections):
    """Settings of a run with a teacher."""
    return short(**sections, distillation={"teacher": str(teacher), "weight": 0.7, **(kind or {})})


@pytest.fixture
def distilled(trained):
    return lambda size, *args, **sections: trained(size, taught(*args, **sections))


LAYOUTS = {
    "tp 2, layers again": (2, {"parallel": TP2, "training": FULL}),
    "pp 2": (2, {"parallel": PP2}),
    "cp 2": (2, {"parallel": CP2}),
    "pp 2, ep 2, recompute": (
        4,
        {"parallel": PP2 | EP2, "training": {"recompute_granularity": "selective"}},
    ),
    "ep 2, static rows": (2, {"parallel": EP2, "moe": {"static_rows": 4.0}}),
    "pp 2, chunks 2": (
        2,
        {
            "model": {"num_layers": 4},
            "parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2},
        },
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_is_one_process(distilled, alone, teachers, layout):
    size, sections = LAYOUTS[layout]
    run = distilled(size, teachers["vanilla"], **sections)
    reference = alone(taught(teachers["vanilla"], model=sections.get("model", {})))
    compare(run, reference, LAYOUT)
    assert run.divergences == pytest.approx(reference.divergences, rel=LAYOUT)
    assert min(reference.divergences) > 0.01


def test_micro_batches_add_up(distilled, teachers):
    # The balance loss is one of each micro-batch, by its definition.
    moe = {"balance_coeff": 0.0}
    whole = distilled(1, teachers["deeper"], moe=moe, training={"micro_batch_size": 4})
    for stages in (1, 2):
        parts = distilled(
            stages,
            teachers["deeper"],
            moe=moe,
            training={"micro_batch_size": 1},
            parallel={"pipeline_model_parallel_size": stages},
        )
        found = difference(parts, whole)
        assert max(found.loss, found.grad_norm, found.gradient) <= LAYOUT, found
        assert parts.divergences == pytest.approx(whole.divergences, rel=LAYOUT)


@pytest.mark.parametrize(
    "kind", [{"top_k": 5}, {"temperature": 2.0}, {"text_weight": 0.0}, {"divergence": "reverse_kl"}]
)
def test_each_kind_of_loss_is_one_process(distilled, alone, teachers, kind):
    one = alone(taught(teachers["vanilla"], kind))
    two = distilled(2, teachers["vanilla"], kind, parallel=TP2)
    compare(two, one, LAYOUT)
    assert two.divergences == pytest.approx(one.divergences, rel=LAYOUT)
    assert one.grad_norms != alone(taught(teachers["vanilla"], model={})).grad_norms


@pytest.mark.parametrize("size", [1, 2])
def test_weight_0_changes_no_bit(trained, distilled, teachers, size):
    sections = {"parallel": PP2} if size == 2 else {}
    without = trained(size, short(**sections))
    measured = distilled(size, teachers["deeper"], {"weight": 0.0}, **sections)
    assert measured.losses == without.losses
    assert measured.grad_norms == without.grad_norms
    assert measured.routing == without.routing
    for name, gradient in without.gradients.items():
        np.testing.assert_array_equal(measured.gradients[name], gradient)
    assert min(measured.divergences) > 0.01


def test_the_gradient_is_that_of_the_sum(alone, teachers):
    """Of three runs that differ only in the two weights, one's gradient is the others' sum."""
    name = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    text, both, divergence = (
        alone(taught(teachers["same"], kind, moe={"balance_coeff": 0.0}), steps=1)
        for kind in ({"weight": 0.0}, {}, {"text_weight": 0.0})
    )
    found = both.gradients[name]
    np.testing.assert_allclose(
        found, text.gradients[name] + divergence.gradients[name], atol=1e-6 * np.abs(found).max()
    )
    assert np.abs(divergence.gradients[name]).max() > 0


def test_a_teacher_teaches_the_next_token_alone(distilled, teachers):
    """Its layers of further tokens have no place in the run's stages, and need none."""
    model = {"num_layers": 3}
    one = distilled(1, teachers["further"], model=model)
    stages = {**PP2, "pipeline_model_parallel_layout": "Ett|tL"}
    two = distilled(2, teachers["further"], model=model, parallel=stages)
    compare(two, one, LAYOUT)
    assert two.divergences == pytest.approx(one.divergences, rel=LAYOUT)


def teacher_of_all(raw, seen):
    """Return the checkpoint that teaches where each rank sees another one as the run's newest."""
    import torch.distributed as dist

    from moepp_megatron.features.distillation.part import DistillationPart

    with mock.patch.object(teacher, "find_checkpoint", return_value=seen[dist.get_rank()]):
        identity = part_of(trainer_of(raw), DistillationPart).state()["teacher"]
    return identity


def refusal_of(raw):
    with pytest.raises(ConfigError) as refused:
        trainer_of(raw)
    return str(refused.value)


def test_resuming_takes_the_same_teacher_alone(ranks, on_one_rank, corpus, tmp_path):
    at_once = {"warmup_iters": 0}
    saves = {"save_interval": 1}
    small = {"global_batch_size": 4, "micro_batch_size": 2}
    first = trainer_settings(corpus, tmp_path / "teacher", optimizer=at_once, checkpoint=saves)
    first["training"] |= {"train_iters": 2} | small
    ranks(1).run(run_trainer, first)
    (older, newer) = sorted((tmp_path / "teacher/checkpoints").glob("step_*"))

    def student(run, teacher, iters, load=None):
        raw = trainer_settings(
            corpus,
            tmp_path / run,
            optimizer=at_once,
            checkpoint={"save_interval": 2, "load": load},
            distillation={"teacher": str(teacher)},
        )
        raw["training"] |= {"train_iters": iters, "seed": 5} | small
        return raw

    ranks(1).run(run_trainer, student("whole", newer, 4))
    ranks(1).run(run_trainer, student("half", newer, 2))
    ranks(1).run(run_trainer, student("half", newer, 4, "auto"))
    for key in ("loss", "distillation_loss"):
        assert logged(tmp_path / "half", key) == logged(tmp_path / "whole", key)
    assert min(logged(tmp_path / "whole", "distillation_loss")) > 0
    refused = on_one_rank(refusal_of, student("half", older, 6, "auto"))
    assert "must be the one that this run was taught by" in refused
    raw = student("other", tmp_path / "teacher", 2)
    identities = ranks(2).run(teacher_of_all, raw, [newer, older])
    assert len(set(identities)) == 1


@pytest.mark.parametrize("stages", ["plain", "interleaved"])
def test_the_combined_schedule_trains_the_same(ranks, teachers, stages):
    size, parallel = (2, EP2) if stages == "plain" else (4, STAGES)
    distillation = {"teacher": str(teachers["vanilla"]), "weight": 0.7}
    run, reference = both(ranks, size, train, parallel=parallel, distillation=distillation)
    compare(run, reference, 0.0)
    assert run.divergences == reference.divergences
    assert min(run.divergences) > 0.01


def estimated_and_held(raw):
    """Bytes that the planner says of this rank's teacher, and those of its parameters."""
    import torch.distributed as dist

    from moepp_megatron.features.distillation.part import DistillationPart
    from moepp_megatron.features.distillation.teacher import TeacherModel
    from moepp_megatron.tools.planning.memory import rank_memory

    config, layout = begin(raw)
    teacher = TeacherModel.of(config)
    assert teacher is not None
    parameters = DistillationPart(config, teacher).parameters()
    stage = layout.coordinates(dist.get_rank()).pp
    held = sum(each.numel() * each.element_size() for each in parameters)
    return rank_memory(config, layout, stage).teacher, held


def test_the_planner_counts_the_teacher(ranks, teachers):
    distillation = {"teacher": str(teachers["deeper"])}
    first, last = ranks(2).run(
        estimated_and_held, settings(distillation=distillation, parallel=PP2)
    )
    assert first[0] == first[1]
    # 4 micro-batches' hidden states, and of one four times the logits, in fp32.
    tokens = 2 * 16
    assert last[0] == last[1] + 4 * tokens * 32 * 4 + tokens * 64 * 4 * 4


def test_what_is_refused(teachers, tmp_path):
    from moepp_megatron.config.hardware import load_hardware
    from moepp_megatron.features.distillation.teacher import TeacherModel
    from moepp_megatron.tools.planning.machine import Machine
    from moepp_megatron.tools.planning.plan import _make_plan

    def refused(match, **sections):
        with config_error(match):
            TeacherModel.of(parse_config(settings(**sections)))

    teacher = {"teacher": str(teachers["same"])}
    refused("must be a checkpoint folder", distillation={"teacher": str(tmp_path / "none")})
    refused("vocab_size", distillation=teacher, model={"vocab_size": 128})
    refused(
        r"must fit this run, and: moe.num_ffn_experts \(4\)",
        distillation={"teacher": str(teachers["vanilla"])},
        parallel={"expert_model_parallel_size": 8},
    )
    refused("nothing would be learnt", distillation={**teacher, "weight": 0.0, "text_weight": 0.0})
    refused("top_k", distillation={**teacher, "top_k": 65})
    with config_error("must be null for a plan"):
        _make_plan(
            parse_config(settings(distillation=teacher)), 8, Machine.of(load_hardware("h100_sxm"))
        )
    (tmp_path / "config.json").write_text("{}")
    refused("moepp convert upcycle", distillation={"teacher": str(tmp_path)})
