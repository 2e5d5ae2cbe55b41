"""Runs of the real trainer whose routers go wrong, and what the routing guard makes of it.

`run` runs on every rank. Faults are planted into weights between steps, as a bad update or a memory
fault would leave them; nothing in the package knows of them.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

from moepp_megatron.observe.alerts import Alert
from tests.parallel.resilience_runs import Without, datasets, trainer_settings
from tests.parallel.training_runs import SyntheticDataset, begin, merged, part_of, with_first_part

# Of a data set: more than the longest run takes. Frequencies of tokens are counted over all.
BATCHES = 130
# The batch from which on some data sets are other data.
NEW_FROM = 24


@dataclass(frozen=True)
class Fault:
    """A fault before a step.

    Attributes:
        step: The step.
        kind: A function of this module.
        layer: Global number of the MoE layer; None for all.
        size: How badly.
    """

    step: int
    kind: str
    layer: int | None = None
    size: float = 1.0


@dataclass
class Found:
    """The findings of one rank.

    Attributes:
        decisions: (step, rule, layer, action) of every alert, in order.
        losses: By step, the last value where a step was taken twice.
        wanted: By step, [MoE layers] FFN share of the selections that routers wanted, all ranks.
        routers: By step, the checksum of this rank's routers as it begins; of all ranks, where
            `train` has joined them.
        weights: Checksum of this rank's weights at the end.
        saved: State of the guard that the newest checkpoint has.
    """

    decisions: list[tuple[int, str, int | None, str]] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    wanted: dict[int, list[float]] = field(default_factory=dict)
    routers: dict[int, Any] = field(default_factory=dict)
    weights: int = 0
    saved: dict[str, Any] = field(default_factory=dict)


WATCHED = {
    "model": {"init_method_std": 0.1},
    "optimizer": {"lr": 3e-3, "decay_style": "constant", "warmup_iters": 0},
    "resilience": {"guard": False, "divergence_interval": 5},
}


def guard_settings(folder, **sections):
    """A small configuration whose files go to `folder`."""
    return trainer_settings(folder, **merged(WATCHED, sections))


def run(raw, faults=(), without=(), data="cycle", copies_every=10):
    """Train as `moepp train` does, on synthetic data, with faults.

    Args:
        raw: The configuration.
        faults: What goes wrong.
        without: Global batches that the data set does not have.
        data: A key of `DATA`.
        copies_every: Steps between copies of the routers; by default as in the package.
    """
    from moepp_megatron.features.guard import copies
    from moepp_megatron.training.trainer import Trainer

    config, layout = begin(raw)
    dataset = Without(DATA[data](config, BATCHES), without)
    with datasets(dataset, dataset), mock.patch.object(copies, "COPY_INTERVAL", copies_every):
        trainer = Trainer(config, layout)
        found = Found()
        _watch(trainer, found, faults)
        trainer.run()
    saved = trainer.states.get("guard", {})
    found.saved = {name: value for name, value in saved.items() if name != "copies"}
    found.weights = checksum_of(p for model in trainer.model.models for p in model.parameters())
    return found


def checksum_of(parameters):
    """One number for the bits of all of them."""
    from moepp_megatron.training.resilience.supervisor import _checksum

    total = 0
    for parameter in parameters:
        total = (total * 31 + int(_checksum(parameter.data))) % 2**61
    return total


def _watch(trainer, found, faults):
    """Plant the faults and write down what happens; both from outside of the guard."""
    from moepp_megatron.features.guard.part import RoutingGuardPart
    from moepp_megatron.training.part import Part, Rollback
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.step_sums import mean_loss

    selections = part_of(trainer, RoutingCountsPart).selections
    planted = []

    class Watching(Part):
        def begin_step(self, step, layout):
            for fault in [each for each in faults if each.step == step and each not in planted]:
                planted.append(fault)
                plant(trainer.model, fault)

        def judge(self, step):
            found.losses[step.number] = mean_loss(step.result.losses)
            ffn, selected = trainer.config.moe.num_ffn_experts, selections()
            found.wanted[step.number] = (selected[:, :ffn].sum(1) / selected.sum(1)).tolist()
            return ()

    with_first_part(trainer, Watching())
    for guard in [part for part in trainer.parts if isinstance(part, RoutingGuardPart)]:
        _note_decisions(guard, found, Rollback)
        _note_routers(guard, trainer, found)


def _note_decisions(guard, found, kind):
    """Write down what the guard's part wants, rollbacks too."""
    original = guard.judge

    def judge(step):
        def note(alerts):
            found.decisions += [(step.number, a.rule, a.layer, a.action) for a in alerts]
            return alerts

        for outcome in original(step):
            if isinstance(outcome, kind):
                before = outcome.alerts_before
                outcome = replace(outcome, alerts_before=lambda at, f=before: note(f(at)))
            elif isinstance(outcome, Alert):
                note([outcome])
            yield outcome

    guard.judge = judge


def _note_routers(guard, trainer, found):
    """Write down this rank's routers as a step begins, with all that the guard has done."""
    from moepp_megatron.moe.layer import moepp_layers

    original = guard.begin_step

    def begin_step(step, layout):
        original(step, layout)
        own = [layer.router for model in trainer.model.models for layer in moepp_layers(model)]
        found.routers[step] = checksum_of(p for router in own for p in router.parameters())

    guard.begin_step = begin_step


def plant(model, fault):
    """Change this rank's weights; the same on ranks that hold the same."""
    import torch

    from moepp_megatron.moe.layer import moepp_layers

    with torch.no_grad():
        for chunk in model.models:
            for layer in moepp_layers(chunk):
                if fault.layer in (None, layer.layer_number):
                    _PLANT[fault.kind](layer.router, fault.size)
    # The optimizer's own copies too, or its next step would undo it.
    model.optimizer.reload_model_params()


def _collapse(router, size):
    """Zero-computation experts in pairs of opposite rows: one of each pair wins with any token."""
    ffn = router.moepp.num_ffn_experts
    rows = router.weight[ffn:]
    rows.mul_(size)
    rows[1::2] = -rows[::2]
    router.weight[:ffn].div_(10.0)
    if router.residual_weight is not None:
        router.residual_weight.zero_()


def _kill(router, size):
    """FFN expert 0 gets the mean of the others' logits, so it is never among a token's best."""
    router.weight[0] = router.weight[1:].mean(dim=0) * size


def _explode(router, size):
    router.weight.mul_(size)


_PLANT = {
    "collapse": _collapse,
    "dead": _kill,
    "explosion": _explode,
}


class CycleDataset(SyntheticDataset):
    """Each token decides the next but for some noise, so there is something to learn."""

    def __getitem__(self, index):
        model = self._config.model
        tokens = _cycle(index, model.seq_length, model.vocab_size)
        return super().__getitem__(index) | {"tokens": tokens[:-1], "labels": tokens[1:]}


@functools.cache
def _cycle(index, length, vocab_size):
    """[length + 1] tokens; a rank makes each sequence once in its life."""
    import torch

    generator = torch.Generator().manual_seed(index)
    noise = torch.rand(length + 1, generator=generator) < 0.1
    token = int(torch.randint(vocab_size, (1,), generator=generator))
    jumps = torch.randint(vocab_size, (length + 1,), generator=generator)
    tokens = []
    for is_noise, jump in zip(noise.tolist(), jumps.tolist(), strict=True):
        token = jump if is_noise else (token * 5 + 3) % vocab_size
        tokens.append(token)
    return torch.tensor(tokens)


class BrokenSourceDataset(SyntheticDataset):
    """From batch 100 on nothing but four token ids comes."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index >= 100 * self._config.training.global_batch_size:
            sample |= {name: sample[name] % 4 for name in ("tokens", "labels")}
        return sample


class OtherTextsDataset(CycleDataset):
    """From `NEW_FROM` on each token decides the next by another rule, and only some ids come."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index >= NEW_FROM * self._config.training.global_batch_size:
            tokens = sample["tokens"] // 8
            sample |= {"tokens": tokens, "labels": 63 - tokens}
        return sample


class OtherTargetsDataset(CycleDataset):
    """From `NEW_FROM` on the same texts have other labels."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index >= NEW_FROM * self._config.training.global_batch_size:
            sample["labels"] = (sample["labels"] + 17) % self._config.model.vocab_size
        return sample


class MaskedDataset(CycleDataset):
    """No token of the second batch has a loss."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index // self._config.training.global_batch_size == 1:
            sample["loss_mask"] = sample["loss_mask"] * 0.0
        return sample


DATA = {
    "masked": MaskedDataset,
    "cycle": CycleDataset,
    "broken source": BrokenSourceDataset,
    "other texts": OtherTextsDataset,
    "other targets": OtherTargetsDataset,
    "skewed": SyntheticDataset,
}
