"""All monitors of a run, as one object for the training loop."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.training.resilience.stragglers import StragglerDetector
from moepp_megatron.training.resilience.watchdog import FIRST_STEP, STEP, Activity, Watchdog
from moepp_megatron.training.setup import TrainingModel

# Odd, as all weights below: an odd weight times a changed bit is never 0 modulo 2^64.
_MULTIPLIER = -7046029254386353131
# Elements at a time, so that the temporary int64 values stay below 200 MB.
_CHUNK = 1 << 23
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Named = list[tuple[str, torch.nn.Parameter]]


class SilentDivergenceError(RuntimeError):
    """Parameters that must be equal on several ranks are not."""


def _check_shared_parameters(models: Sequence[torch.nn.Module], step: int) -> None:
    """Compare every parameter with its copies on other ranks, bit by bit; every rank must call."""
    # The copies are those of FFN experts on the expert-data-parallel ranks, of everything else on
    # the data- and context-parallel ranks, of whatever tensor parallelism does not split (norms,
    # routers, zero-computation experts) on the tensor-parallel ranks too, of tied embeddings on the
    # first and last pipeline stage.
    problems: list[str] = []
    for parameters, group in _shared(models):
        if group.size() > 1:
            problems += _differences(parameters, group)
    num_problems = torch.tensor([len(problems)], device=torch.cuda.current_device())
    dist.all_reduce(num_problems)
    if int(num_problems) == 0:
        return
    # Every rank of a group finds the same.
    lines = list(dict.fromkeys(line for lines in gathered(problems) for line in lines))
    raise SilentDivergenceError(
        f"after step {step}, ranks hold different copies of the same parameters "
        f"({len(lines)} cases); a memory fault or an unsynchronised update: test the node of the "
        "named ranks and resume from a checkpoint (checkpoint.load=auto)\n"
        + "\n".join(f"  step {step}: {line}" for line in lines[:50])
    )


def _shared(models: Sequence[torch.nn.Module]) -> Iterator[tuple[Named, dist.ProcessGroup]]:
    """Parameters with the ranks that must hold the same; the same order on all of these ranks."""
    experts: Named = []
    split: Named = []
    whole: Named = []
    tied: Named = []
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            entry = (f"{name} (model chunk {index})" if len(models) > 1 else name, parameter)
            if not getattr(parameter, "allreduce", True):
                experts.append(entry)
            elif getattr(parameter, "tensor_model_parallel", False):
                split.append(entry)
            else:
                whole.append(entry)
            if getattr(parameter, "shared_embedding", False):
                # One object under two names would be two entries on a lone stage.
                tied.append(("tied embedding", parameter))
    yield experts, parallel_state.get_expert_data_parallel_group()
    yield split, parallel_state.get_data_parallel_group(with_context_parallel=True)
    yield whole, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if tied:
        yield tied, parallel_state.get_embedding_group()


def _differences(parameters: Named, group: dist.ProcessGroup) -> list[str]:
    """A line per parameter that differs within the group."""
    if not parameters:
        return []
    mine = torch.stack([_checksum(_plain_value(parameter)) for _, parameter in parameters])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    by_rank = torch.stack(everyone).tolist()
    ranks = dist.get_process_group_ranks(group)
    lines = []
    for column, (name, parameter) in enumerate(parameters):
        sums = [row[column] for row in by_rank]
        if len(set(sums)) > 1:
            lines.append(f"{name} {list(parameter.shape)}: {_who(ranks, sums)}")
    return lines


def _plain_value(tensor: Tensor) -> Tensor:
    """The values of a weight, in FP8 or not, as a plain tensor of its dtype."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


def _who(ranks: list[int], sums: list[int]) -> str:
    """Name the ranks that differ from the majority, or all if there is none."""
    (value, count), *rest = Counter(sums).most_common()
    if rest and rest[0][1] == count:
        shown = ", ".join(
            f"rank {r} {s & (2**64 - 1):016x}" for r, s in zip(ranks, sums, strict=True)
        )
        return f"no two halves agree: {shown}"
    different = ", ".join(str(rank) for rank, s in zip(ranks, sums, strict=True) if s != value)
    return f"rank {different} differs from the other {count} of {len(ranks)} ranks"


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """Sum all bit patterns, each times a weight of its position, modulo 2^64: a scalar int64."""
    # One changed bit always changes it; other differences are missed with a probability of about
    # 2^-32 or less. Unlike a SHA it needs no copy to the host: a GPU reads the tensor once.
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + part.numel(), device=words.device)
        total += (part * (position * _MULTIPLIER * 2 + 1)).sum()
    return total


class Supervisor:
    """The monitors of a run, a context around the loop; those switched off are not built."""

    def __init__(self, config: Config, model: TrainingModel) -> None:
        settings = config.resilience
        self._model, self._divergence_interval = model, settings.divergence_interval
        self.activity = Activity()
        self._steps_begun = 0
        self._metrics: dict[str, int | float] = {}
        self._monitors: list[Watchdog | StragglerDetector] = []
        if settings.hang_timeout_s > 0:
            self._monitors.append(Watchdog(Path(config.run.dir), self.activity, settings))
        self._stragglers: StragglerDetector | None = None
        if settings.straggler_interval > 0 and dist.get_world_size() > 1:
            self._stragglers = StragglerDetector(
                settings.straggler_interval, settings.straggler_threshold
            )
            self._monitors.append(self._stragglers)

    def __enter__(self) -> Self:
        """Begin; every rank must enter."""
        for monitor in self._monitors:
            monitor.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, whatever happened."""
        for monitor in reversed(self._monitors):
            monitor.stop()

    def begin_step(self, step: int) -> None:
        """Training step `step` begins."""
        self._steps_begun += 1
        self.activity.enter(STEP if self._steps_begun > 1 else FIRST_STEP, step)
        if self._stragglers is not None:
            self._stragglers.begin_step()

    def during(self, phase: str) -> AbstractContextManager[None]:
        """Mark work that may take long: evaluation, saving, loading."""
        return self.activity.during(phase)

    def end_step(self, step: int) -> None:
        """End step `step`; every rank must call. SilentDivergenceError if copies differ."""
        if self._stragglers is not None:
            self._metrics = self._stragglers.end_step(step)
        if self._divergence_interval > 0 and step % self._divergence_interval == 0:
            with self._model.gathered_parameters():
                _check_shared_parameters(self._model.models, step)

    def metrics(self) -> dict[str, int | float]:
        """Optional fields of the step's record."""
        return self._metrics
