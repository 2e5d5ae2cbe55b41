"""A teacher in training: its forward pass before the model's, and the loss that compares both.

The teacher has the run's layout. megatron-core's schedules run it without gradients: with pipeline
stages once a step over all micro-batches, else before each micro-batch of the model. What is kept
until the model gets there is the teacher's last hidden states; the logits, which are as wide as
the vocabulary, are made when they are compared.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moepp_megatron.config import Config, ConfigError, check_world_size
from moepp_megatron.features.distillation.teacher import TeacherModel
from moepp_megatron.model.build import build_model
from moepp_megatron.model.stage import evaluation_stages
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.training.checkpoint.read import load_weights
from moepp_megatron.training.part import Fields, Part, PartContext, State, Step, Why
from moepp_megatron.training.step import Batch, Batches, unchanged
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks


class DistillationPart(Part):
    """The teacher of a run, the loss that it gives, and its sum over a step.

    Every rank builds its part of the teacher; process groups must exist.
    """

    key = "distillation"

    def __init__(self, config: Config, teacher: TeacherModel) -> None:
        check_world_size(teacher.config, dist.get_world_size())
        self._config, self._settings, self._teacher = config, config.distillation, teacher
        models = build_model(teacher.config)
        load_weights(teacher.checkpoint, models)
        self._models, self._stages = models, evaluation_stages(models, teacher.config)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._runs_ahead = parallel_state.get_pipeline_model_parallel_world_size() > 1
        # Last hidden states [s, b, D] of micro-batches that the model has not reached yet.
        self._hidden: deque[Tensor] = deque()
        # Sum of the divergences in nats, and tokens.
        self._sums = StepCounts(2)

    @classmethod
    def of(cls, run: PartContext) -> "DistillationPart | None":
        """The part of a run; None without a teacher."""
        if run.config.distillation.teacher is None:
            return None
        # A run that teaches may save between the looks of two ranks.
        teacher = Agreement().from_first(TeacherModel.of(run.config))
        with unchanged(run.model):
            return cls(run.config, teacher)

    def parameters(self) -> Iterator[Tensor]:
        """This rank's parameters of the teacher."""
        return (parameter for model in self._models for parameter in model.parameters())

    def batches(self, batches: Batches, num_microbatches: int) -> Batches:
        """Begin a step on its micro-batches; returns iterators over the same ones."""
        self._hidden.clear()
        self._sums.reset()
        if not self._runs_ahead:
            return batches
        chunks = [[next(iterator) for _ in range(num_microbatches)] for iterator in batches]
        self._run(chunks[0])
        return [iter(chunk) for chunk in chunks]

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Run the teacher over a micro-batch that the model is about to see; compare both."""
        if not self._runs_ahead:
            self._run([batch])
        return {"output_processor": self.process_output}

    @torch.no_grad()
    def _run(self, batches: list[Batch]) -> None:
        iterators = [iter(batches) for _ in self._stages]
        hidden = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._stages,
            num_microbatches=len(batches),
            seq_length=self._config.model.seq_length,
            micro_batch_size=self._config.training.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        self._hidden.extend(hidden or [])

    def process_output(
        self,
        hidden_states: Tensor,
        output_layer: Callable[..., tuple[Tensor, Any]],
        output_weight: Tensor | None,
        labels: Tensor,
        compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
        **_: Any,
    ) -> Tensor:
        """Return [2, b, s] fp32, each token's language-model loss and divergence.

        The signature is that of megatron-core's `output_processor`.
        """
        logits, _ = output_layer(hidden_states, weight=output_weight)
        group = parallel_state.get_tensor_model_parallel_group()
        settings = self._settings
        # First: the language-model loss may overwrite the logits.
        reverse = {"forward_kl": False, "reverse_kl": True}[settings.divergence]
        scale = settings.temperature, settings.top_k, reverse
        divergence = _kl_divergence(logits, self._next_logits(), group, *scale)
        losses = compute_language_model_loss(labels, logits)
        return torch.stack([losses.float(), divergence.transpose(0, 1)])

    @torch.no_grad()
    def _next_logits(self) -> Tensor:
        """[s, b, V / tp] the teacher's, of the micro-batch that the model has reached."""
        model = self._models[-1]
        weight = None
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        logits: Tensor = model.output_layer(self._hidden.popleft(), weight=weight)[0]
        return logits

    def loss(self, loss: Tensor, output: Tensor, loss_mask: Tensor, num_tokens: Tensor) -> Tensor:
        """The weighted sum of the losses and the divergences, which are counted."""
        divergence = (output[1] * loss_mask).sum()
        if first_of_tensor_ranks():
            self._sums.own += torch.stack([divergence.detach().double(), num_tokens.double()])
        settings = self._settings
        if settings.weight == 0:
            # Not multiplied by 0: the gradients are to be those without a teacher, bit by bit.
            return settings.text_weight * loss
        return settings.text_weight * loss + settings.weight * divergence

    def summands(self) -> Sequence[Summand]:
        """The divergences."""
        return (self._sums,)

    def record(self, step: Step, fields: Fields) -> Fields:
        """The mean divergence of the step's tokens, over all ranks, in nats."""
        divergence, tokens = self._sums.total().tolist()
        return {"distillation_loss": divergence / tokens}

    def state(self) -> State:
        """The teacher's identity."""
        return {"teacher": self._teacher.identity}

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Raise ConfigError if the teacher is not the one that the run has had."""
        before, now = state.get("teacher"), self._teacher.identity
        if before not in (None, now):
            raise ConfigError(
                f"distillation.teacher ({self._teacher.checkpoint}, SHA-256 {now[:16]}...) must be "
                f"the one that this run was taught by before ({before[:16]}...); name that "
                "checkpoint itself, not a run that has newer ones, or begin a new run with "
                "checkpoint.load_optimizer=false"
            )
        return ()


def _forward_step(iterator: Iterator[Batch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = stage(
        batch["tokens"], batch["position_ids"], None, output_processor=_last_hidden_states
    )
    return output, lambda hidden, non_loss_data: hidden


def _last_hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


def _kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    group: dist.ProcessGroup,
    temperature: float,
    top_k: int | None,
    reverse: bool,
) -> Tensor:
    """Return [s, b] fp32 divergence in nats of logits [s, b, V / tp], exact where ranks share V."""
    # Hinton et al., arXiv 1503.02531: with p and q the softmax of the teacher's and the model's
    # logits over temperature T, each token gets T^2 KL(p || q) = T^2 sum_v p_v (log p_v - log q_v);
    # the reverse is T^2 KL(q || p) (arXiv 2306.08543). megatron-core leaves both to the package
    # nvidia-modelopt.
    #
    # It is at least 0 up to rounding. Where both logits are the same it is exactly 0 on one rank or
    # two; more ranks may add up the two sums of exponentials in other orders. The model's logits
    # may be overwritten afterwards, the teacher's get no gradient. With `top_k` only this many of
    # the teacher's largest logits are compared (more where some are equal to the least of them),
    # both softmaxes being over these.
    kept = None if top_k is None else _largest(teacher_logits, top_k, group)
    arguments = (logits, teacher_logits, kept, group, temperature, reverse)
    divergence: Tensor = _Divergence.apply(*arguments)
    return divergence


def _largest(logits: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """[s, b, V / tp] bool: whether a logit is among the `count` largest of all ranks'."""
    local_largest = logits.float().topk(min(count, logits.shape[-1]), dim=-1).values.contiguous()
    shares = [torch.empty_like(local_largest) for _ in range(group.size())]
    dist.all_gather(shares, local_largest, group=group)
    least = torch.cat(shares, dim=-1).topk(count, dim=-1).values[..., -1:]
    return logits >= least


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher_logits: Tensor,
        kept: Tensor | None,
        group: dist.ProcessGroup,
        temperature: float,
        reverse: bool,
    ) -> Tensor:
        # Exponents, then probabilities: in place, since each is as wide as the vocabulary.
        q, p = (
            tensor.detach().to(torch.float32, copy=True).div_(temperature)
            for tensor in (logits, teacher_logits)
        )
        if kept is not None:
            for tensor in (q, p):
                tensor.masked_fill_(~kept, -torch.inf)
        largest = torch.stack([q.amax(dim=-1), p.amax(dim=-1)])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        q -= largest[0].unsqueeze(-1)
        p -= largest[1].unsqueeze(-1)
        apart = p - q
        if kept is not None:
            apart.masked_fill_(~kept, 0.0)
        q.exp_()
        p.exp_()
        apart *= q if reverse else p
        sums = torch.stack([tensor.sum(dim=-1) for tensor in (q, p, apart)])
        dist.all_reduce(sums, group=group)
        q_sum, p_sum, weighted = sums
        nats = weighted / (q_sum if reverse else p_sum) + q_sum.log() - p_sum.log()
        # d KL / d logits = (q - p) / T; of the reverse q (log q - log p - KL) / T, in which the
        # logarithms of the sums cancel. In the logits' own format, which the gradient has anyway.
        q /= q_sum.unsqueeze(-1)
        if reverse:
            q *= (weighted / q_sum).unsqueeze(-1)
        q -= apart.div_(q_sum.unsqueeze(-1)) if reverse else p.div_(p_sum.unsqueeze(-1))
        ctx.save_for_backward(q.mul_(temperature).to(logits.dtype))
        return (-nats if reverse else nats) * temperature**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return difference * grad.unsqueeze(-1).to(difference.dtype), *[None] * 5
