"""Continues prompts with a cache of keys and values, in any layout that can decode.

The cache holds keys and values of every attention layer, in megatron-core's
`StaticInferenceContext`. Nothing else is cached, since everything outside of attention treats each
position by itself. That holds for the gating residual too. A router adds `G z` of the same position
one MoE layer below, which the same forward pass has just computed, so the lane of router logits is
always as long as the hidden states: the prompt first, one position from then on (`moe/lane.py`).

Selections are never dropped. A capacity limit counts the tokens of a forward pass, so with a cache
(few tokens per pass) it would decide differently than without. The request switches it off. The
released MoE++ code, which only infers, has no limit either (moe_plus_plus_layer.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.sampling import TorchSampling
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.model.build import build_model
from moepp_megatron.model.stage import evaluation_stages
from moepp_megatron.training.checkpoint import load_weights
from moepp_megatron.training.generate_request import GenerateRequest, Sampling

# In place of a token, where the model's logits are no numbers.
_NOT_A_NUMBER = -1


def generate_texts(request: GenerateRequest) -> list[str]:
    """Continue all prompts; every rank must call, and process groups must exist.

    Returns:
        Prompt and continuation of each, on every rank.
    """
    models = build_model(request.config)
    load_weights(request.checkpoint, models)
    new = continue_prompts(
        models,
        request.config,
        request.layout,
        request.prompts,
        request.max_new_tokens,
        request.sampling,
        eod=request.tokenizer.eod,
        vocab_size=request.tokenizer.vocab_size,
    )
    return [
        request.tokenizer.decode(prompt + tokens)
        for prompt, tokens in zip(request.prompts, new, strict=True)
    ]


class CachedModel:
    """This rank's stage of a model that remembers keys and values of what it has read.

    megatron-core's inference wrapper runs the pass, stage after stage. It takes the width of what
    stages exchange from the outermost module, as the training schedules do, so the lane of router
    logits crosses unchanged.

    Args:
        models: This rank's model chunks: one.
        config: The configuration that they were built from.
        batch: Sequences read side by side.
        max_length: Positions to keep room for.
    """

    def __init__(
        self, models: list[LanguageModule], config: Config, batch: int, max_length: int
    ) -> None:
        (stage,) = evaluation_stages(models, config)
        self.context = StaticInferenceContext(batch, max_length)
        self._wrapper = GPTInferenceWrapper(stage, self.context)
        self._wrapper.prep_model_for_inference()

    def read(self, tokens: Tensor) -> Tensor | None:
        """Read the next tokens of every sequence; every rank must call.

        Args:
            tokens: [b, n] int64. The first call reads any number, every later one n = 1:
                from then on megatron-core's attention applies no causal mask.

        Returns:
            [b, vocab] fp32 logits after the last token, on the last pipeline stage; None before.
        """
        begin = self.context.sequence_len_offset
        assert begin == 0 or tokens.shape[1] == 1, "after the prompt tokens come one by one"
        if begin > 0:
            self.context.enable_decode_mode()
        positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        with InferenceMode.active():
            logits = self._wrapper.run_one_forward_step(
                {
                    "tokens": tokens,
                    "position_ids": positions.expand_as(tokens),
                    "attention_mask": None,
                }
            )
        return None if logits is None else logits[:, -1].float()


def continue_prompts(
    models: list[LanguageModule],
    config: Config,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    eod: int,
    vocab_size: int,
) -> list[list[int]]:
    """New tokens of each prompt, without the end-of-document token; every rank must call.

    All prompts start at position 0 and none is padded: as far as the shortest goes they are read
    at once, then token by token, a longer prompt's own tokens before any that are drawn. So a
    prompt's continuation does not depend on the others.

    Args:
        models: This rank's model chunks.
        config: The configuration that they were built from.
        layout: The rank grid.
        prompts: Token ids, at least one for each prompt.
        max_new_tokens: Tokens to add at most.
        sampling: How they are drawn.
        eod: Token id that ends a continuation.
        vocab_size: Ids below it are tokens; the model's vocabulary may be larger.

    Raises:
        FloatingPointError: The model's logits are not numbers.
    """
    longest = max(len(prompt) for prompt in prompts)
    model = CachedModel(models, config, len(prompts), longest + max_new_tokens)
    sampler = _Sampler(sampling, len(prompts), layout, vocab_size)
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    length = min(len(prompt) for prompt in prompts)
    tokens = [list(prompt[:length]) for prompt in prompts]
    while True:
        logits = model.read(torch.tensor(tokens, device=torch.cuda.current_device()))
        drawing = [
            length >= len(prompt) and not end for prompt, end in zip(prompts, ended, strict=True)
        ]
        drawn = sampler.draw(logits, drawing)
        for row, token in enumerate(drawn):
            if drawing[row] and token != eod:
                new[row].append(token)
            if drawing[row]:
                ended[row] = token == eod or len(new[row]) == max_new_tokens
        if all(ended):
            return new
        # A sequence that has ended reads fillers; their output is dropped.
        tokens = [
            [prompt[length] if length < len(prompt) else token]
            for prompt, token in zip(prompts, drawn, strict=True)
        ]
        length += 1


class _Sampler:
    """Draws on one rank for all."""

    # Logits of data-parallel ranks may differ in the last bit, since experts see other rows beside
    # theirs; ranks that drew independently could differ.

    def __init__(self, sampling: Sampling, count: int, layout: Layout, vocab_size: int) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        # Pipeline stages are the slowest in the order of ranks: the first rank of the last stage.
        self._source = layout.world_size - layout.world_size // layout.pp
        self._generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(count)]

    def draw(self, logits: Tensor | None, drawing: Sequence[bool]) -> list[int]:
        """A token for each sequence, 0 for those that draw none.

        Args:
            logits: [b, vocab] fp32 on the last stage.
            drawing: Which sequences need a token.
        """
        tokens = torch.zeros(len(drawing), dtype=torch.long)
        if dist.get_rank() == self._source:
            assert logits is not None, "the last pipeline stage has logits"
            rows = logits[:, : self._vocab_size].cpu()
            for row in (row for row, draws in enumerate(drawing) if draws):
                tokens[row] = self._one(rows[row], self._generators[row])
        tokens = tokens.to(torch.cuda.current_device())
        dist.broadcast(tokens, self._source)
        drawn: list[int] = tokens.tolist()
        if _NOT_A_NUMBER in drawn:
            raise FloatingPointError("the model's logits are not finite: its weights are not sound")
        return drawn

    def _one(self, logits: Tensor, generator: torch.Generator) -> int:
        if not logits.isfinite().all():
            return _NOT_A_NUMBER
        return sample(logits, self._sampling.temperature, self._sampling.top_p, generator)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token.

    The generator's numbers are assigned to tokens in the order of their ids, so logits that differ
    in the last bits (another layout) give the same token, but for a draw that falls into that bit.

    Args:
        logits: [vocab] fp32 on the host, where the same generator gives the same numbers whatever
            device the model is on.
        temperature: 0 takes the largest logit, the first of equal ones; 1 samples from the model's
            probabilities.
        top_p: Sample from the smallest set of tokens with this much probability; 0 leaves the
            likeliest only, 1 leaves all.
        generator: Source of randomness, on the host.
    """
    if temperature == 0 or top_p == 0:
        return int(logits.argmax())
    # Temperatures below fp32's smallest number would divide by 0; the largest logit is then 0 / t.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    # For megatron-core 0 means no nucleus; 1 would cut off what rounds to more than 1.
    nucleus = top_p if top_p < 1 else 0.0
    row = (logits - logits.max()).unsqueeze(0)
    return int(TorchSampling.sample_from_logits(row, temperature, 0, nucleus, generator=generator))
