"""The divergence of the model's next tokens from a teacher's, over a shared vocabulary.

Hinton et al., arXiv 1503.02531: with p and q the softmax of the teacher's and the model's logits
over temperature T, each token gets T^2 KL(p || q) = T^2 sum_v p_v (log p_v - log q_v); the reverse
is T^2 KL(q || p) (arXiv 2306.08543). megatron-core leaves both to the package nvidia-modelopt.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    top_k: int | None = None,
    reverse: bool = False,
) -> Tensor:
    """[s, b] fp32 divergence of each token in nats, exact for a vocabulary that ranks share.

    It is at least 0 up to rounding. Where both logits are the same it is exactly 0 on one rank or
    two; more ranks may add up the two sums of exponentials in other orders. Logits are [s, b, V /
    tp]; the model's may be overwritten afterwards, the teacher's get no gradient. With `top_k` only
    this many of the teacher's largest logits are compared (more where some are equal to the least
    of them), both softmaxes being over these.
    """
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


def _copy(logits: Tensor) -> Tensor:
    return logits.detach().to(torch.float32, copy=True)


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
        q, p = (_copy(tensor).div_(temperature) for tensor in (logits, teacher_logits))
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
