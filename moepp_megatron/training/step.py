"""One training step: forward and backward over the micro-batches, then the optimizer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.samples import PADDING, Batch
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.training.rng import get_rng_state, set_rng_state
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step_sums import StepSums, Summand, read_step, zeros

# Iterators over the same micro-batches, one for each model chunk.
Batches = list[Iterator[Batch]]


class StepHooks:
    """Hooks of a training step besides the model's own loss; these methods do nothing.

    Attributes:
        may_refuse: True if `refuses` may refuse a batch, so that a step must be undoable.
        may_repeat: True if `repeats` may ask for the step's passes once more.
    """

    may_refuse = may_repeat = False

    def batches(self, batches: Batches, num_microbatches: int) -> Batches:
        """Iterators over the same micro-batches as `batches`, when a step begins."""
        return batches

    def arguments(self, batch: Batch) -> Mapping[str, Any]:
        """Further arguments of the model's forward pass over a micro-batch."""
        return {}

    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Look at a model chunk, its micro-batch and token losses [b, s]; last pipeline stage."""

    def loss(self, loss: Tensor, output: Tensor, loss_mask: Tensor, num_tokens: Tensor) -> Tensor:
        """Return the scalar to backpropagate for this micro-batch.

        `loss` is a scalar, the sum of the token losses and of what hooks before have added.
        `output` is [b, s] token losses, or [n, b, s] with these first, where `arguments` changed
        what the model returns. `loss_mask` is [b, s] fp32, `num_tokens` the number that count.
        """
        return loss

    def summands(self) -> Sequence[Summand]:
        """Values to sum over all ranks before the optimizer acts."""
        return ()

    def repeats(self) -> bool:
        """True to undo the passes and run them again over the same batches; asked once a step."""
        return False

    def refuses(self, sums: StepSums, losses: Tensor) -> bool:
        """True to skip the batch's update; arguments as of `StepResult`."""
        return False


@dataclass
class StepResult:
    """Result of one step on this rank.

    Attributes:
        losses: [2] float64 on the device: sum of token losses and number of tokens, on the last
            pipeline stage.
        sums: The values read from the device before the optimizer acted.
        updated: True if the optimizer changed the parameters.
        is_finite: True if loss and gradients are finite on all ranks, as far as a guard looks.
    """

    losses: Tensor
    sums: StepSums
    updated: bool = True
    is_finite: bool = True

    @property
    def grad_norm(self) -> float:
        """Global gradient norm before clipping."""
        return self.sums.grad_norm


def training_step(
    model: TrainingModel,
    batches: Batches,
    config: Config,
    layout: Layout,
    hooks: Sequence[StepHooks] = (),
    summands: Sequence[Summand] = (),
    begin_again: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run one optimizer step of a model in training mode.

    Args:
        batches: One iterator over micro-batches per model chunk, all in the same order.
        hooks: What else the step does, in order. All of them judge the batch; where one refuses it,
            it is read and nothing else has changed.
        summands: What is summed over all ranks besides what the hooks sum.
        begin_again: Called before passes that a hook has run again.
    """
    repeaters = [hook for hook in hooks if hook.may_repeat]
    if repeaters:
        # Drawn before the state is noted: a loader draws random numbers, and draws only once.
        drawn = [[next(each) for _ in range(layout.num_microbatches)] for each in batches]
        batches = [iter(each) for each in drawn]
    judges = [hook for hook in hooks if hook.may_refuse]
    before = _StepState(model.models) if judges or repeaters else None
    result = compute_gradients(model, batches, config, layout, hooks, summands)
    wishes = [hook.repeats() for hook in repeaters]
    if before is not None and any(wishes):
        before.restore()
        begin_again()
        batches = [iter(each) for each in drawn]
        result = compute_gradients(model, batches, config, layout, hooks, summands)
    verdicts = [judge.refuses(result.sums, result.losses) for judge in judges]
    if before is not None and any(verdicts):
        before.restore()
        return replace(result, is_finite=math.isfinite(result.sums.loss))
    # The schedule counts the step that is being taken: the first step already learns.
    model.scheduler.step(increment=1)
    # `ChainedOptimizer.step` calls these two methods first; what they would compute again (one pass
    # over all gradients and an all-reduce) is known from `prepare_gradients`.
    norm = result.grad_norm
    with replaced(model.optimizer, prepare_grads=lambda: False, get_grad_norm=lambda: norm):
        updated, _, _ = model.optimizer.step()
    return replace(result, updated=bool(updated))


def compute_gradients(
    model: TrainingModel,
    batches: Batches,
    config: Config,
    layout: Layout,
    hooks: Sequence[StepHooks] = (),
    summands: Sequence[Summand] = (),
) -> StepResult:
    """First half of `training_step`, which takes the same arguments: all but the optimizer."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    num_microbatches = layout.num_microbatches
    for hook in hooks:
        batches = hook.batches(batches, num_microbatches)
    losses = run_schedule(model, batches, config, num_microbatches, False, hooks)
    squares, found_inf = prepare_gradients(model.optimizer)
    summands = [*summands, *(each for hook in hooks for each in hook.summands())]
    sums = read_step(losses, squares, found_inf, summands)
    return StepResult(losses, sums, updated=False)


@contextmanager
def unchanged(model: TrainingModel) -> Iterator[None]:
    """Restore random number generators and buffers after the block."""
    before = _StepState(model.models)
    try:
        yield
    finally:
        before.restore()


def run_schedule(
    model: TrainingModel,
    batches: Batches,
    config: Config,
    num_microbatches: int,
    forward_only: bool,
    hooks: Sequence[StepHooks] = (),
) -> Tensor:
    """Run Megatron's pipeline schedule over `num_microbatches` micro-batches of this rank.

    `batches` and `hooks` are as in `training_step`, and the hooks' step has begun. Returns [2]
    float64 on the device: sum of token losses and number of tokens on this rank; zeros on all
    stages but the last.
    """
    forward_backward = get_forward_backward_func()
    reduced = forward_backward(
        forward_step_func=partial(_forward_step, hooks=hooks),
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=list(model.chunks),
        num_microbatches=num_microbatches,
        seq_length=config.model.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=forward_only,
    )
    if not reduced:
        return zeros(2)
    return torch.stack([entry["loss"] for entry in reduced]).sum(dim=0)


def _forward_step(
    iterator: Iterator[Batch],
    model: Any,
    return_schedule_plan: bool = False,
    hooks: Sequence[StepHooks] = (),
) -> tuple[Any, Any]:
    """One micro-batch's output, or its plan for the combined schedule, and its loss function."""
    batch = next(iterator)
    forward = model.build_schedule_plan if return_schedule_plan else model
    extra: dict[str, Any] = {key: batch[key] for key in {PADDING, "loss_mask"} & batch.keys()}
    for hook in hooks:
        extra |= hook.arguments(batch)
    mask = batch.get("attention_mask")
    output = forward(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"], **extra)
    return output, partial(_loss_function, model, batch, hooks)


def _loss_function(
    chunk: torch.nn.Module, batch: Batch, hooks: Sequence[StepHooks], output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of token losses, number of tokens, and both for the log, without what hooks add."""
    token_losses = output if output.dim() == 2 else output[0]
    for hook in hooks:
        hook.see(chunk, batch, token_losses)
    loss_mask = batch["loss_mask"]
    loss = (token_losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    report = torch.stack([loss.detach().double(), num_tokens.double()])
    for hook in hooks:
        loss = hook.loss(loss, output, loss_mask, num_tokens)
    return loss, num_tokens.to(torch.int), {"loss": report}


@torch.no_grad()
def prepare_gradients(optimizer: MegatronOptimizer) -> tuple[Tensor, bool]:
    """First half of `optimizer.step()`: gradients in place, their global norm; no state changes.

    Returns [groups] fp32 squared gradient norms on the device, over all ranks that hold parts, and
    whether gradients were found that are not finite. The norms are what
    `ChainedOptimizer.get_grad_norm` computes before it reads: one where all optimizers reduce it
    over the same ranks, else one for each (dense parameters, spread experts).
    """
    assert isinstance(optimizer, ChainedOptimizer), f"{type(optimizer)} is not chained"
    found_inf = bool(optimizer.prepare_grads())
    parts = optimizer.chained_optimizers
    if len(parts) > 1 and optimizer.grads_states_parallel_group_is_shared():
        gradients = [[grad for part in parts for grad in part.get_grads_for_grad_norm()]]
    else:
        gradients = [part.get_grads_for_grad_norm() for part in parts]
    device = torch.cuda.current_device()
    squares = torch.zeros(len(gradients), dtype=torch.float32, device=device)
    for square, part, grads in zip(squares.split(1), parts, gradients, strict=False):
        if grads:
            overflow = torch.zeros(1, dtype=torch.int, device=device)
            norm, _ = clip_grads.multi_tensor_applier(
                clip_grads.l2_norm_impl, overflow, [grads], False
            )
            square.copy_(norm**2.0)
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
    return squares, found_inf


class _StepState:
    """Random number generators and module buffers of this rank at one moment."""

    # Dropout and router noise draw numbers; `finalize_model_grads` moves selection biases, which
    # are buffers. Everything here is small (tens of kB).

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._buffers = [
            (buffer, buffer.detach().clone()) for model in models for buffer in model.buffers()
        ]
        self._random = get_rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to that moment."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        set_rng_state(self._random)
