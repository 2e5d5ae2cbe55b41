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
