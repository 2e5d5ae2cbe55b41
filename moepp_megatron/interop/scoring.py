"""Per-token log-probabilities of given sequences, and continuations of prompts, in any layout.

Prompts are continued by scoring: the whole text is read again for every new token. No keys and
values are cached, so that whatever can be scored can be continued. Exports decode with a cache, in
transformers and in servers (docs/how_to/serve.md).
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.model.build import build_model
from moepp_megatron.model.stage import PipelineStage, evaluation_stages
from moepp_megatron.training.checkpoint.read import load_weights
from moepp_megatron.training.token_scores import Sequences, padded_length, score_sequences

if TYPE_CHECKING:
    from moepp_megatron.interop.generate import GenerateRequest, Sampling
    from moepp_megatron.interop.score import ScoreRequest

# In place of a token, where the model's logits are no numbers.
_NOT_A_NUMBER = -1


def scoring_stages(request: "ScoreRequest") -> list[PipelineStage]:
    """This rank's part of the checkpoint's model, ready to score; every rank must call."""
    models = build_model(request.config)
    load_weights(request.checkpoint, models)
    return evaluation_stages(models, request.config)


def score_stages(
    request: "ScoreRequest", stages: list[PipelineStage]
) -> dict[str, np.ndarray] | None:
    """Score all sequences with a model that is built; every rank must call.

    Returns:
        On rank 0 `token_logprobs` [b, s-1] float64, the log-probability of each token after the
        first given those before it, and where wanted `logits` [b, s, vocab] fp32. None elsewhere.
    """
    padded = request.config.model.seq_length
    scores = score_sequences(stages, Sequences(request.input_ids, padded, logits=request.logits))
    if scores is None:
        return None
    wanted = {"token_logprobs": scores["token_logprobs"][:, :-1]}
    if request.logits:
        wanted["logits"] = scores["logits"]
    for name, values in wanted.items():
        assert not np.isnan(values).any(), f"some {name} are no numbers"
    return wanted


def continue_prompts(stages: list[PipelineStage], request: "GenerateRequest") -> list[list[int]]:
    """New tokens of each prompt, without the end-of-document token; every rank must call.

    `stages` are this rank's part of the model, whose vocabulary may be larger than the tokenizer's.
    Raise FloatingPointError if its logits are not numbers.
    """
    prompts, sampling, tokenizer = request.prompts, request.sampling, request.tokenizer
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    unfinished = list(range(len(prompts)))
    while unfinished:
        logits = _next_logits(stages, request.scoring, [texts[number] for number in unfinished])
        tokens = torch.zeros(len(unfinished), dtype=torch.long)
        # Rank 0 draws for all: logits of others may differ in the last bit.
        if logits is not None and not logits.isfinite().all():
            tokens[:] = _NOT_A_NUMBER
        elif logits is not None:
            for place, number in enumerate(unfinished):
                row = logits[place, : tokenizer.vocab_size]
                tokens[place] = _sample(row, sampling, generators[number])
        tokens = tokens.to(torch.cuda.current_device())
        dist.broadcast(tokens, 0)
        if (tokens == _NOT_A_NUMBER).any():
            raise FloatingPointError("the model's logits are not finite: its weights are not sound")
        for number, token in zip(tuple(unfinished), tokens.tolist(), strict=True):
            texts[number] += [token] * (token != tokenizer.eod)
            added = len(texts[number]) - len(prompts[number])
            if token == tokenizer.eod or added == request.max_new_tokens:
                unfinished.remove(number)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _next_logits(
    stages: list[PipelineStage], scoring: "ScoreRequest", texts: list[list[int]]
) -> Tensor | None:
    """[b, vocab] fp32 logits after each text, on rank 0."""
    longest = max(len(text) for text in texts)
    padded = padded_length(longest, scoring.layout, scoring.config.model.seq_length)
    input_ids = np.zeros((len(texts), padded), dtype=np.int64)
    for row, text in zip(input_ids, texts, strict=True):
        row[: len(text)] = text
    last = np.array([len(text) - 1 for text in texts])
    scores = score_sequences(stages, Sequences(input_ids, padded, only=last, logits=True))
    return None if scores is None else torch.from_numpy(scores["logits"][:, 0])


def _sample(logits: Tensor, sampling: "Sampling", generator: torch.Generator) -> int:
    """Draw a token from [vocab] fp32 logits; at temperature 0 the first of the largest."""
    # The generator's numbers are assigned to tokens in the order of their ids, so logits that
    # differ in the last bits (another layout) give the same token, but for a draw that falls into
    # that bit. On the host the same generator gives the same numbers whatever the model's device.
    if 0 in (sampling.temperature, sampling.top_p):
        return int(logits.argmax())
    # Temperatures below fp32's smallest number would divide by 0; the largest logit is then 0 / t.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
