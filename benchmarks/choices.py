"""What optional choices cost a training step and its memory, each against the default in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.choices [--rounds 12]

For each choice the quickstart model is built twice on the same ranks, without it and with it. First
every tensor of the model, of its optimizer and of a step is followed (`tensor_bytes.py`), then
steps of both are taken in turn. Prints ratios of a round's times, median (smallest to largest), by
wall time and by the processor time of rank 0, and MiB of rank 0: held between steps, and the most
within a step.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from benchmarks.quickstart_steps import Kind, QuickstartSteps, Times, in_turns, on_ranks, ratios

Step = Callable[[], object]
_WHOLE = ("parallel.use_distributed_optimizer=false",)
_BF16 = ("precision.dtype=bf16",)
_GROUPS = ("moe.num_groups=4", "moe.group_topk=2")
_DOCUMENT_TOKENS = 64
# Name -> what both models have beside the quickstart's settings, and what the choice sets.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "optimizer.kind=muon": (_WHOLE, ("optimizer.kind=muon",)),
    "optimizer.kind=lion": (_WHOLE, ("optimizer.kind=lion",)),
    "moe.num_groups=4 moe.group_topk=2": ((), _GROUPS),
    "model.mtp_num_layers=1": ((), ("model.mtp_num_layers=1",)),
    "data.reset_attention_mask=true": ((), ("data.reset_attention_mask=true",)),
    "distillation.teacher=(as large)": ((), ("distillation.teacher=teacher",)),
    "precision.grad_reduce_in_fp32=false": (_BF16, ("precision.grad_reduce_in_fp32=false",)),
    "a callback that does nothing": ((), ()),
}


def documents_of_random_tokens(config: Any) -> Any:
    """Random tokens, every `_DOCUMENT_TOKENS` of them a document."""
    from moepp_megatron.data.conversations import DOCUMENTS
    from moepp_megatron.workbench.bench.step import RandomTokens

    class Documents(RandomTokens):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            documents = sample["position_ids"] // _DOCUMENT_TOKENS
            return sample | {DOCUMENTS: documents}

    return Documents(config)


def step_of(name: str, folder: Path, settings: tuple[str, ...]) -> Step:
    """Builds a model; returns its step."""
    has_documents = any("reset_attention_mask" in setting for setting in settings)
    dataset = documents_of_random_tokens if has_documents else None
    steps = QuickstartSteps.build(folder, *settings, dataset=dataset)
    if steps.config.distillation.teacher is not None:
        return _taught(steps, folder)
    return _with_callback(steps) if "callback" in name else steps.take


def _taught(steps: QuickstartSteps, folder: Path) -> Step:
    """A step with a teacher of the model's own shape."""
    from moepp_megatron.config import load_config
    from moepp_megatron.training.checkpoint import CheckpointWriter, Progress
    from moepp_megatron.training.distillation import Distillation
    from moepp_megatron.training.teacher import TeacherModel

    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    plain = load_config(quickstart, [f"run.dir={folder}"])
    checkpoints = CheckpointWriter(folder / "teacher", plain, folder / "no tokenizer")
    checkpoint = checkpoints.save(steps.model, Progress())
    assert checkpoints.error is None, checkpoints.error
    teacher = Distillation(steps.config, TeacherModel(checkpoint, plain))
    return lambda: steps.take(None, None, (), teacher)


def _with_callback(steps: QuickstartSteps) -> Step:
    from moepp_megatron.training.callbacks import Callback, Callbacks
    from moepp_megatron.training.checkpoint import Progress
    from moepp_megatron.training.signals import StopRequest

    supervisor: Any = SimpleNamespace(during=lambda what: nullcontext())
    callbacks = Callbacks(steps.config, steps.model, supervisor, [Callback()])

    def step() -> None:
        steps.take()
        callbacks.tell_step(None)

    callbacks.following(Progress, StopRequest()).__enter__()
    return step


def followed(make: Callable[[], Step]) -> tuple[Step, float, float]:
    """The step that is made, MiB of tensors that then stay, and the most while it is taken."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from benchmarks.tensor_bytes import live_bytes, tensor_bytes

    before, made = live_bytes(), []

    # megatron-core's tracker has as many layers as the first model that it has seen.
    destroy_moe_metrics_tracker()

    def prepare() -> Step:
        made.append(make())
        made[0]()  # The first step makes the optimizer's state.
        return made[0]

    found = tensor_bytes(prepare)
    return made[0], (found.before - before) / 2**20, (found.peak - before) / 2**20


def row(name: str, folder: Path, rounds: int) -> str:
    """Measures one choice."""
    base, own = CHOICES[name]
    plain, *without = followed(partial(step_of, "", folder, base))
    chosen, *with_it = followed(partial(step_of, name, folder, (*base, *own)))
    times = in_turns({"plain": Kind(plain), "chosen": Kind(chosen)}, rounds)
    mib = [f"{a:.0f} to {b:.0f}" for a, b in zip(without, with_it, strict=True)]
    return "| " + " | ".join([f"`{name}`", *_ratios(times), *mib]) + " |"


def measure(rounds: int, folder: Path) -> list[str]:
    """A table, one row a choice."""
    from benchmarks.fresh_ranks import forget_model

    heads = ["choice", "step time", "processor time", "MiB held", "MiB within a step"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for number, name in enumerate(CHOICES):
        lines.append(row(name, folder / str(number), rounds))
        forget_model()
        if dist.get_rank() == 0:
            # The whole takes minutes, and a later choice may fail.
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def _ratios(times: Mapping[str, Times]) -> list[str]:
    found = []
    for clock in ("wall", "processor"):
        values = ratios(getattr(times["chosen"], clock), getattr(times["plain"], clock))
        median = statistics.median(values)
        found.append(f"{median:.2f} ({min(values):.2f} to {max(values):.2f})")
    return found


if __name__ == "__main__":
    on_ranks(__doc__, default_rounds=12, measure=measure)
