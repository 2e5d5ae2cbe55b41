"""MoE++ models in Megatron-Bridge, and with it in NeMo-RL. Importing this registers the formats.

provider.py   `MoEPPModelProvider`, and the layers of a plain `GPTModelProvider`
formats.py    the bridges: Hugging Face folders in and out, by the tensor rules of a format

NeMo-RL imports what `policy.megatron_cfg.bridge_plugins` lists, such as this module. A script
imports it before `AutoBridge.from_hf_pretrained`.
"""

try:
    import megatron.bridge  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"moepp_megatron.interop.bridge needs megatron-bridge, which cannot be imported ({error}); "
        "install it as docs/how_to/from_megatron_bridge.md says"
    ) from error

from moepp_megatron.interop.bridge import formats as _formats  # noqa: F401
from moepp_megatron.interop.bridge.provider import MoEPPModelProvider, moepp_layer_spec

__all__ = ["MoEPPModelProvider", "moepp_layer_spec"]
