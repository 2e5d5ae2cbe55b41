"""Exported models in fine-tuning: adapters, gradient checkpointing, the balance loss."""

import importlib.util

import numpy as np
import pytest

# Everything at once, small: two-layer gates, residuals, head norms, a shared and a dense layer.
FIELDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    # Large: routing by clear margins.
    "initializer_range": 0.2,
    "num_ffn_experts": 4,
    "moe_layers": [1, 0, 1, 1],
    "gate_normalization": "selected",
    "two_layer_gate": True,
    "selection_bias": True,
    "qk_norm": True,
    "shared_expert_intermediate_size": 24,
    "tau": 0.5,
}
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs the package peft"
)


def random_model(**changes):
    """A model of our modelling file whose gating residuals and biases say something."""
    import torch

    from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig
    from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPForCausalLM

    torch.manual_seed(3)
    model = MoEPPForCausalLM(MoEPPConfig(**(FIELDS | changes)))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0.05, -0.05, len(buffer)))
    return model


def batch(padded=False):
    """Two sequences; the second ends in padding where asked for."""
    import torch

    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(checkpointing):
    model = random_model(output_router_logits=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    counted = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "moe"):
            layer.mlp.moe.gate.register_forward_hook(lambda *_: counted.append(1))
    model(**batch()).loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return grads | {"calls": np.array(len(counted))}


def test_gradient_checkpointing_gives_the_same_gradients(plain):
    expected, checkpointed = plain(gradients, False), plain(gradients, True)
    assert checkpointed.pop("calls") == 2 * expected.pop("calls"), "nothing was recomputed"
    assert checkpointed.keys() == expected.keys()
    residual = "model.layers.3.mlp.moe.gate.gate_map.weight"
    assert np.abs(expected[residual]).max() > 0.0
    for name, value in expected.items():
        # The same operations in the same order.
        assert np.array_equal(checkpointed[name], value), name


def reentrant_message():
    model = random_model()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    with pytest.raises(ValueError, match="use_reentrant") as caught:
        enable({"use_reentrant": True})
    return str(caught.value)


def test_reentrant_checkpointing_is_refused(plain):
    assert "must be False" in plain(reentrant_message)


def balance_losses(padded, scope, kind):
    """Return the balance losses that the model adds, and those of `moe.reference`."""
    import torch

    from moepp_megatron.moe.config import MoEPPConfig
    from moepp_megatron.moe.reference import balance_loss, select_experts

    changes = {"balance_scope": scope, "balance_loss": kind}
    model = random_model(output_router_logits=False, **changes).eval()
    inputs = batch(padded)
    plain_output = model(**inputs)
    assert getattr(plain_output, "router_logits", None) is None
    output = model(**inputs, output_router_logits=True)
    assert len(output.router_logits) == 3
    config = MoEPPConfig(
        4,
        num_constant_experts=2,
        num_copy_experts=1,
        num_zero_experts=1,
        router_topk=2,
        tau=0.5,
        gate_normalization="selected",
        two_layer_gate=True,
        selection_bias=True,
        balance_loss=kind,
    )
    bias = torch.linspace(0.05, -0.05, 8)
    mask = inputs["attention_mask"].bool()
    parts = len(mask) if scope == "sequence" else 1

    def reference(first):
        total = 0.0
        for logits in output.router_logits:
            layer = logits.unflatten(0, (len(mask), -1))[:, first:].chunk(parts)
            for tokens, counts in zip(layer, mask[:, first:].chunk(parts), strict=True):
                _, selected, scores = select_experts(tokens[counts], config, bias)
                total += float(balance_loss(scores, selected, config)) / parts
        return total

    both = inputs["input_ids"], inputs["attention_mask"]
    recorded = model.model(*both, output_router_logits=True).router_logits
    assert all(map(torch.equal, recorded, output.router_logits))
    begun = model(inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4])
    rest = inputs["input_ids"][:, 4:], inputs["attention_mask"]
    continued = model(*rest, cache=begun.cache, output_router_logits=True)
    coefficient = model.config.router_aux_loss_coef
    return {
        "aux": float(output.aux_loss),
        "reference": reference(0),
        "continued": float(continued.aux_loss),
        "continued reference": reference(4),
        "added": float(output.loss - plain_output.loss) / coefficient,
        "accumulated": float(
            (
                model(**inputs, num_items_in_batch=44, output_router_logits=True).loss
                - model(**inputs, num_items_in_batch=44).loss
            )
            / coefficient
        ),
        "predicted": float((inputs["labels"][:, 1:] != -100).sum()),
        "positional": float(model(*both, output_router_logits=True).aux_loss),
        "tuple": float(model(**inputs, output_router_logits=True, return_dict=False)[1]),
    }


@pytest.mark.parametrize(
    ("scope", "kind"),
    [("microbatch", "heterogeneous"), ("sequence", "heterogeneous"), ("sequence", "grouped")],
)
@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_is_that_of_the_reference(plain, padded, scope, kind):
    values = plain(balance_losses, padded, scope, kind)
    assert values["aux"] > 0.1
    # fp32 sums of a few dozen scores in another order.
    assert values["aux"] == pytest.approx(values["reference"], rel=1e-5)
    assert values["continued"] == pytest.approx(values["continued reference"], rel=1e-5)
    assert values["positional"] == values["aux"]
    assert values["tuple"] == values["aux"]
    # A difference of two losses around 4, divided by 0.01: their last bits are 100 times larger.
    assert values["added"] == pytest.approx(values["aux"], abs=1e-4)
    share = values["predicted"] / 44
    assert values["accumulated"] == pytest.approx(values["aux"] * share, abs=1e-4)


def balance_gradient():
    """Largest gradient of the first gate from only the balance loss, and FFN's share of it."""
    model = random_model().train()
    model(**batch(), output_router_logits=True).aux_loss.backward()
    gate = model.model.layers[0].mlp.moe.gate.wg[2].weight.grad
    untouched = model.model.layers[3].mlp.moe.experts.ffn.gate_up_proj.grad
    return float(gate.abs().max()), 0.0 if untouched is None else float(untouched.abs().max())


def test_balance_loss_trains_routers(plain):
    gate, last_expert = plain(balance_gradient)
    assert gate > 1e-4
    assert last_expert == 0.0


def adapter_run():
    """LoRA on every weight matrix: outputs before training, after a step, and merged."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = random_model().to(torch.bfloat16).eval()
    for module in base.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    inputs = batch()
    with torch.no_grad():
        before = base(**inputs).logits.float().numpy()
    weights = ["ffn.gate_up_proj", "ffn.down_proj"]
    weights += ["wg.0.weight", "wg.2.weight", "gate_map.weight", "wg.weight"]
    lora = LoraConfig(r=4, target_modules="all-linear", target_parameters=weights)
    model = get_peft_model(base, lora).train()
    with torch.no_grad():
        start = model(**inputs).logits.float().numpy()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**inputs, output_router_logits=True).loss.backward()
        grads = {
            name: float(p.grad.abs().max())
            for name, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    model = model.float().eval()
    with torch.no_grad():
        trained = model(**inputs).logits.numpy()
        merged = model.merge_and_unload()(**inputs).logits.numpy()
    return {"before": before, "start": start, "trained": trained, "merged": merged, "grads": grads}


@needs_peft
def test_adapters_on_every_weight_matrix(plain):
    run = plain(adapter_run)
    # An adapter begins at 0.
    assert np.array_equal(run["start"], run["before"])
    parts = ("gate.wg.0", "gate.wg.2", "gate.gate_map", "experts.experts.4.wg", "q_proj", ".ffn.")
    for part in parts:
        assert any(part in name and value > 0.0 for name, value in run["grads"].items()), part
    assert np.abs(run["trained"] - run["before"]).max() > 0.01
    # Weights with the adapter added in: fp32, with the norms of heads behind the sum.
    np.testing.assert_allclose(run["merged"], run["trained"], rtol=0, atol=1e-4)


def half_precision_gates():
    """Router logits of bf16 weights, by themselves and under autocast, and in fp32."""
    import torch

    model = random_model().to(torch.bfloat16).eval()
    inputs = batch() | {"labels": None}
    gate = model.model.layers[0].mlp.moe.gate
    seen = []
    gate.register_forward_hook(lambda module, args, output: seen.append((args[0], output[2])))
    with torch.no_grad():
        model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
    x, logits = seen[1]
    first, second = (gate.wg[index].weight.float() for index in (0, 2))
    return logits.numpy(), (torch.tanh(x.float() @ first.T) @ second.T).detach().numpy()


def test_gates_are_fp32_under_autocast(plain):
    logits, expected = plain(half_precision_gates)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def old_transformers(folder):
    import sys

    import transformers

    name = "moepp_megatron.interop.hf_files.modeling_moepp"
    for module in (name, name.replace("modeling", "configuration")):
        sys.modules.pop(module, None)
    version = transformers.__version__
    transformers.__version__ = "5.7.1"
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    finally:
        transformers.__version__ = version
    return ""


def test_older_transformers_is_reported(plain, tmp_path):
    message = plain(old_transformers, tmp_path)
    assert "transformers (5.7.1) must be at least 5.8" in message
    assert "needs transformers >= 5.8" in message


def test_heads_need_not_divide_the_hidden_size():
    from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig

    assert MoEPPConfig(hidden_size=66, num_attention_heads=4, head_dim=24).head_dim == 24
