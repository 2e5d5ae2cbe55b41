"""A tiny model in FP8, from a configuration as users write it, and what it did.

`tests/gpu` runs it with Transformer Engine itself: only `calls_of` needs the stand-in.
"""

import re

import torch

from moepp_megatron.config import parse_config
from moepp_megatron.model.build import build_model
from tests.parallel.training_runs import merged

RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
}
# The modules of the experts' two products.
EXPERTS = ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")
SEQUENCE, BATCH, VOCAB = 16, 2, 64


def config_of(recipe, **sections):
    """Four layers of hidden size 32 with 4 FFN experts; FP8 where a recipe is given."""
    precision = {"dtype": "bf16"}
    if recipe is not None:
        precision |= {"fp8": "hybrid", "fp8_recipe": recipe}
    settings = {
        "run": {"dir": "runs/none"},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 2,
            "seq_length": SEQUENCE,
            "vocab_size": VOCAB,
            "init_method_std": 0.1,
        },
        "moe": {"num_ffn_experts": 4},
        "optimizer": {"lr": 1e-2},
        "training": {"train_iters": 10, "global_batch_size": BATCH, "micro_batch_size": BATCH},
        "precision": precision,
    }
    return parse_config(merged(settings, sections))


def model_of(config):
    (model,) = build_model(config)
    return model


def losses(model, seed=3):
    """[b, s] losses of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=generator).to(device)
    positions = torch.arange(SEQUENCE, device=device).expand(BATCH, -1)
    return model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())


def assert_gradients(model):
    """Fail unless every parameter has a gradient, of numbers."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def compare_gradients(model, reference, pattern):
    """Hold gradients of parameters whose name matches against another model's; how many they are.

    In fp32, with sums in another order.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = {n: p.grad for n, p in reference.named_parameters() if re.search(pattern, n)}
    for name, gradient in compared.items():
        limit = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=limit)
    return len(compared)


def calls_of(module):
    """Return the recorded calls of a class of modules, by the name of megatron-core's class."""
    from transformer_engine.pytorch.record import CALLS

    return [call for call in CALLS if call.module == module]


def count_stand_in(monkeypatch):
    """Have the stand-in count as Transformer Engine, with nothing recorded."""
    from transformer_engine.pytorch.record import CALLS

    from moepp_megatron.model import build, megatron_config

    for module in (build, megatron_config):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: True)
    fields = megatron_config._kernel_fields
    monkeypatch.setattr(
        megatron_config,
        "_kernel_fields",
        # As on a GPU: Transformer Engine's modules initialise their own weights.
        lambda config: fields(config) | {"use_cpu_initialization": False},
    )
    CALLS.clear()
