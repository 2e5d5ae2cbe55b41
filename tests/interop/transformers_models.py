"""Models of the transformers package."""

import importlib
import sys


def load_model(folder, released=False):
    """Load a folder with our modelling file, as transformers does with trust_remote_code."""
    from transformers import AutoModelForCausalLM

    if not released:
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    module = importlib.import_module("moepp_megatron.interop.hf_files.modeling_moepp")
    assert module.__name__ in sys.modules
    return module.MoeForCausalLM.from_pretrained(folder).eval()


def logprobs_of(model, ids):
    """Log-probabilities of all tokens of [1, n] ids but the first."""
    import torch

    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
