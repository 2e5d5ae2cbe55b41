"""Exports in servers: what vLLM's Transformers backend asks of the modelling file, and vLLM."""

import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.commands import captured, succeeded
from tests.interop.checkpoints import CASES, GOLDEN, hf_to_mcore, mcore_to_hf
from tests.interop.models import settings
from tests.interop.test_export import MODELS, save_and_compute, save_model
from tests.interop.test_finetuning import FIELDS, batch, random_model
from tests.interop.transformers_models import load_model, logprobs_of
from tests.parallel.training_runs import SyntheticDataset, begin_training, short, train

VLLM = os.environ.get("MOEPP_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    VLLM is None, reason="needs MOEPP_VLLM_PYTHON: the interpreter of an environment with vLLM"
)
VLLM_MODULES = (
    "vllm.compilation.decorators",
    "vllm.config",
    "vllm.distributed",
    "vllm.forward_context",
    "vllm.logger",
    "vllm.model_executor.layers.fused_moe",
    "vllm.model_executor.layers.layernorm",
    "vllm.model_executor.models",
    "vllm.model_executor.models.utils",
    "vllm.platforms",
    "vllm.sequence",
    "vllm.utils.torch_utils",
)
LENGTHS = (3, 15, 1, 9, 2, 12)


def ignored_keys(layers):
    """Keys of the model, and of a released checkpoint's first MoE layer, that loaders drop."""
    model = random_model(moe_layers=layers, gating_residual=True)
    unused = f"model.layers.{layers.index(1)}.mlp.moe.gate.gate_map.weight"
    dropped = []
    for part in (model, model.model):
        patterns = part._keys_to_ignore_on_load_unexpected
        dropped.append([key for key in (*part.state_dict(), unused) if matches(patterns, key)])
    return dropped[0], dropped[1]


def matches(patterns, key):
    return any(re.search(pattern, key) for pattern in patterns)


@pytest.mark.parametrize("layers", [[1] * 12, [0, 1, 0, 1]])
def test_no_weight_of_the_model_is_one_that_loaders_drop(plain, layers):
    # transformers drops only keys that the model does not have, vLLM all that match.
    expected = [f"model.layers.{layers.index(1)}.mlp.moe.gate.gate_map.weight"]
    assert plain(ignored_keys, layers) == (expected, expected)


def second_stage():
    """A model whose first layers are those of another pipeline stage, which pass hidden states."""
    import torch

    model = random_model(num_hidden_layers=4, moe_layers=None)
    for index in (0, 1):
        model.model.layers[index] = torch.nn.Identity()
        model.model.layers[index].forward = lambda hidden, **_: hidden
    try:
        model(**batch())
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_pipeline_stage_that_lacks_router_logits_is_refused(plain):
    assert "run all layers in one stage" in plain(second_stage)


def packed_products():
    """Logits in bf16, also where linear modules are packed, as vLLM does on a CPU."""
    import torch

    def pack(module):
        weight, bias = module.weight, module.bias
        packed = torch.nn.Module()
        # The weight is empty, and the product takes its own dtype only.
        packed.weight = torch.nn.Parameter(weight.new_empty(0))
        packed.forward = lambda x: torch.nn.functional.linear(x, weight, bias)
        return packed

    model = random_model().to(torch.bfloat16).eval()
    inputs = batch() | {"labels": None}
    with torch.no_grad():
        expected = model(**inputs).logits.float().numpy()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(module, name, pack(child))
        return model(**inputs).logits.float().numpy(), expected


def test_linear_modules_may_be_replaced_by_products_in_bf16(plain):
    packed, expected = plain(packed_products)
    np.testing.assert_array_equal(packed, expected)


def bias_of_a_half_precision_model():
    import torch

    from moepp_megatron.interop.hf_files.configuration_moepp import MoEPPConfig
    from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPModel

    torch.set_default_dtype(torch.bfloat16)
    try:
        model = MoEPPModel(MoEPPConfig(**FIELDS))
    finally:
        torch.set_default_dtype(torch.float32)
    return str(model.layers[0].mlp.moe.gate.e_score_correction_bias.dtype)


def test_selection_biases_are_fp32_however_the_model_is_built(plain):
    assert plain(bias_of_a_half_precision_model) == "torch.float32"


def loaded_in_vllm(change, is_plugin):
    """Return what loading says of one changed tensor; the plug-in on a stand-in for vLLM."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    whole = random_model()
    weights = dict(revert_weight_conversion(whole, whole.state_dict()))
    begin = "model.layers.2.mlp.moe."
    name = f"{begin}experts.experts.2.up_proj.weight"
    value = weights.pop(name)
    changed = {
        "": (name, value),
        "name": (name.replace("up_proj", "gate"), value),
        "shape": (name, value[:1]),
        "int8": (name, value.to(torch.int8)),
        "half": (name, value.half()),
    }
    weights |= dict([changed[change]])
    try:
        if not is_plugin:
            cut = len(begin + "experts.")
            own = [(n[cut:], v) for n, v in weights.items() if n.startswith(begin + "experts.")]
            return str(len(list(whole.model.layers[2].mlp.moe.experts.load_weights(own)))), []
        llama = mock.MagicMock()
        llama.LlamaForCausalLM = type("", (), {"load_weights": lambda _, weights: set(weights)})
        modules = {name: mock.MagicMock() for name in ("vllm", *VLLM_MODULES)}
        modules["vllm.model_executor.models"].llama = llama
        with mock.patch.dict(sys.modules, modules):
            from moepp_megatron.interop.vllm import model as plugin
        plugin._LOGGER.reset_mock()
        model = object.__new__(plugin.MoEPPForCausalLM)
        model.config = whole.config
        model.config.dtype = torch.float32
        model._init_model(vllm_config=mock.MagicMock())
        count = str(len(model.load_weights(weights.items())))
        return count, [call.args[1:] for call in plugin._LOGGER.warning.call_args_list]
    except ValueError as error:
        return str(error), []


@pytest.mark.parametrize("is_plugin", [False, True])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("", None),
        ("name", "experts.2.gate.weight must not be in the checkpoint; copy all files of the"),
        ("shape", r"experts.2.up_proj.weight: its shape \(\[1, \d+\]\) must be \[\d+, \d+\] by"),
        ("int8", r"its dtype \(torch.int8\) must be float32, bfloat16 or float16"),
        ("half", None),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_or_named(plain, change, told, is_plugin):
    said, warnings = plain(loaded_in_vllm, change, is_plugin)
    if told is None:
        assert said.isdigit()
    else:
        assert re.search(told, said), said
    name = "model.layers.2.mlp.moe.experts.experts.2.up_proj.weight"
    expected = [(name, "float16", "float32")] if change == "half" and is_plugin else []
    assert warnings == expected


def routes(folder, *prompts):
    """The picks of transformers' model, [tokens of all prompts, MoE layers, K]."""
    import torch

    model = load_model(folder)
    picks = []
    with torch.no_grad():
        for prompt in prompts:
            lane = {}
            model.model(torch.tensor([prompt]), router_lane=lane)
            gates = {layer: model.model.layers[layer].mlp.moe.gate for layer in lane}
            picks.append(
                torch.stack([gates[layer].select(lane[layer])[1] for layer in sorted(lane)], 1)
            )
    return torch.cat(picks).numpy()


def save_as_it_begins(raw, folder):
    """Save the model as training begins with it; the tokens of the first batch."""
    config, _, model = begin_training(raw)
    for wrapped in model.chunks:
        wrapped.zero_grad_buffer()
    # Gradients and decay of 0 change nothing; the optimizer then has a state to save.
    model.optimizer.step()
    save_model(folder, model, config)
    dataset = SyntheticDataset(config, 1)
    return [dataset[index]["tokens"].tolist() for index in range(len(dataset))]


def test_training_repeats_the_routes_that_transformers_took(on_one_rank, plain, tmp_path):
    sections = {"optimizer": {"weight_decay": 0.0}, "moe": {"layer_freq": [0, 1]}}
    tokens = on_one_rank(save_as_it_begins, short(**sections), tmp_path / "checkpoints")
    mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    picked = plain(routes, tmp_path / "hf", *tokens)
    own, theirs = tmp_path / "own", tmp_path / "theirs"
    run, _ = on_one_rank(train, short(routes={"record": str(own)}, **sections), 1)
    (file,) = own.iterdir()
    with np.load(file) as written:
        np.testing.assert_array_equal(written["routed_experts"], picked)
        contents = dict(written) | {"routed_experts": picked}
    theirs.mkdir()
    np.savez(theirs / file.name, **contents)
    again, _ = on_one_rank(train, short(routes={"replay": str(theirs)}, **sections), 1)
    assert again.losses == run.losses
    assert again.grad_norms == run.grad_norms


def decoder_of(folder, ids):
    """The decoder's hidden states of tokens without padding, as vLLM builds and calls it."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert list(config.auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    decoder = AutoModel.from_config(config, trust_remote_code=True).eval()
    whole = load_model(folder)
    assert type(decoder).is_backend_compatible()
    decoder.load_state_dict(whole.model.state_dict())
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        hidden = decoder(
            input_ids=tokens,
            position_ids=torch.arange(tokens.shape[1])[None],
            use_cache=False,
            return_dict=False,
        )[0]
        return whole.lm_head(hidden).numpy()


@pytest.mark.parametrize("layout", ["moepp", "released"])
def test_the_decoder_by_itself(plain, tmp_path, layout):
    case = GOLDEN / CASES[0]
    hf_to_mcore(case, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", layout)
    expected = np.load(case / "expected.npz")
    logits = plain(decoder_of, tmp_path / "hf", expected["input_ids"][:1])
    np.testing.assert_allclose(logits, expected["logits"][:1], rtol=0, atol=1e-4)


def greedy(folder, prompts):
    """Greedy answers of transformers, in the form of `vllm_answers.py`."""
    import torch

    model = load_model(folder)
    # Models of ours stop at the end of a document; here all answers have one length.
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # Without a mask, transformers takes tokens of the padding's id for padding.
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        tokens = whole[0, len(prompt) :].tolist()
        answers.append({"tokens": tokens, "logprobs": logprobs_of(model, whole)})
    return answers


def assert_vllm_agrees(plain, export, *changes):
    """Text and log-probabilities of vLLM, in one batch, are those of transformers."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 64, length).tolist() for length in LENGTHS]
    files = [export.parent / name for name in ("prompts.json", "answers.json")]
    files[0].write_text(json.dumps(prompts))
    program = Path(__file__).with_name("vllm_answers.py")
    command = [str(VLLM), str(program), str(export), *map(str, files), *changes]
    succeeded(captured(command, timeout=570, cwd=export.parent))
    theirs, expected = json.loads(files[1].read_text()), plain(greedy, export, prompts)
    for answer, wanted in zip(theirs, expected, strict=True):
        assert answer["tokens"] == wanted["tokens"]
        np.testing.assert_allclose(answer["logprobs"], wanted["logprobs"], rtol=0, atol=1e-3)


@needs_vllm
@pytest.mark.parametrize("name", ["paper", "everything else"])
def test_vllm_computes_the_same(ranks, plain, tmp_path, name):
    # vLLM's attention on a CPU has heads of 32 and more.
    model = {"num_layers": 3, "kv_channels": 32, "seq_length": 32}
    changes = {"model": MODELS[name].get("model", {}) | model, "moe": MODELS[name]["moe"]}
    ranks(1).run(save_and_compute, settings(**changes), tmp_path / "checkpoints")
    mcore_to_hf(tmp_path / "checkpoints", tmp_path / "hf")
    assert_vllm_agrees(plain, tmp_path / "hf", "max_model_len=32")
