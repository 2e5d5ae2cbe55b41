"""The names with an underscore that this package takes from megatron-core, each with its reason.

megatron-core may rename or change them in any version. `check_upstream` looks for all of them
before the first layer is built and says what has moved, by name, instead of an AttributeError in
the middle of a step or, worse, a number that is wrong. docs/upgrading.md says what to do then.
"""

import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from moepp_megatron.moe.upstream_settings import undecided
from moepp_megatron.moe.upstream_versions import TESTED_VERSION, by_name, version, version_problem
from moepp_megatron.runtime.optional import how_to_install

Use = Literal["called", "overridden", "read"]


@dataclass(frozen=True)
class _PrivateName:
    """A private name, its place below `megatron.core` as 0.19 calls it, and its use."""

    # `module:Class.name` for a method, or an attribute that the class's constructor sets;
    # `module:name` without a class.
    path: str
    use: Use
    reason: str
    # Those that this package relies on, with spaces between them.
    parameters: str = ""

    @property
    def name(self) -> str:
        """The name by itself."""
        return re.split("[:.]", self.path)[-1]


# What layers need, in any loop.
_LAYER_NAMES = (
    _PrivateName(
        "transformer.transformer_layer:TransformerLayer._forward_attention",
        "called",
        "first half of a layer; a CUDA graph captures it under this name",
        "hidden_states attention_mask context rotary_pos_emb",
    ),
    _PrivateName(
        "transformer.transformer_layer:TransformerLayer._forward_mlp",
        "called",
        "second half of a layer without experts",
        "inference_context padding_mask packed_seq_params",
    ),
    _PrivateName(
        "transformer.transformer_layer:TransformerLayer._forward_pre_mlp_layernorm",
        "called",
        "norm before the router, with its recomputation and offloading",
        "hidden_states",
    ),
    _PrivateName(
        "transformer.transformer_layer:TransformerLayer._forward_post_mlp",
        "called",
        "residual addition, and the end of the norm's recomputation and offloading",
        "mlp_output_with_bias residual",
    ),
    _PrivateName(
        "transformer.moe.router:TopKRouter._apply_expert_bias",
        "overridden",
        "megatron-core masks the selections [T, E] of padding by [T]",
        "routing_map padding_mask",
    ),
    _PrivateName(
        "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "overridden",
        "the number of permuted rows comes from the routing map, and is needed on the host",
        "point tokens_per_expert",
    ),
    _PrivateName(
        "transformer.moe.token_dispatcher:MoEFlexTokenDispatcher._comm_manager",
        "read",
        "DeepEP gets indices with unused slots; bytes are counted from its indices",
    ),
    _PrivateName(
        "transformer.moe.token_dispatcher:_DeepepManager._indices_to_multihot",
        "called",
        "an object's is replaced, so that the host does not wait for a selection by a mask",
        "indices probs",
    ),
    _PrivateName(
        "models.common.model_chunk_schedule_plan:TransformerLayerSchedulePlan._build_callable_nodes",
        "overridden",
        "nodes of the combined schedule that carry the router logits",
        "event comp_stream comm_stream extra_args",
    ),
    _PrivateName(
        "transformer.multi_latent_attention:MLASelfAttention._qkv_down_projection",
        "overridden",
        "the whole gradient of the shared position key on local modules",
        "hidden_states",
    ),
    _PrivateName(
        "transformer.multi_token_prediction:MultiTokenPredictionLayer._concat_embeddings",
        "overridden",
        "the router logits go past the projection",
        "hidden_states decoder_input",
    ),
    _PrivateName(
        "transformer.multi_token_prediction:MultiTokenPredictionLayer._get_embeddings",
        "overridden",
        "the padding mask moves with the tokens, and what lies beyond the end is padding",
        "padding_mask",
    ),
    _PrivateName(
        "transformer.multi_token_prediction:MultiTokenPredictionLayer._postprocess",
        "overridden",
        "the router logits go past the norm",
        "hidden_states",
    ),
    _PrivateName(
        "models.common.language_module.language_module:LanguageModule._scale_logits",
        "called",
        "the scale of muP",
        "logits",
    ),
    _PrivateName(
        "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding._apply_scaling",
        "called",
        "HybridModel does not hand on rope_scaling",
        "freqs factor",
    ),
)
PRIVATE_NAMES = (
    *_LAYER_NAMES,
    # Of training/checkpoint: what is missing would be found at a run's first save.
    _PrivateName(
        "dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks",
        "overridden",
        "a save that only plans which rank writes what",
        "writer save_state_dict_ret async_strategy",
    ),
    _PrivateName(
        "dist_checkpointing.strategies.torch:_get_filesystem_reader",
        "read",
        "replaced while loading, so that nothing unpickles a checkpoint's index",
    ),
    _PrivateName(
        "dist_checkpointing.strategies.filesystem_async:_results_queue",
        "read",
        "set, so that no process is started for a queue that nothing reads",
    ),
    # Of training/optimizers.py.
    _PrivateName(
        "optimizer:_get_megatron_emerging_optimizer",
        "called",
        "overrides that give routers to AdamW, which get_megatron_optimizer refuses",
        "config model_chunks config_overrides",
    ),
    # Of training/setup.py.
    _PrivateName(
        "tensor_parallel.random:_get_share_storage",
        "called",
        "compiles the extension of recompute_modules before the first step",
    ),
)


class UpstreamMovedError(ImportError):
    """The installed megatron-core lacks something that MoE++ layers use."""


@cache
def check_upstream(names: tuple[_PrivateName, ...] = _LAYER_NAMES) -> None:
    """Look for names once a process: `_LAYER_NAMES`, or `PRIVATE_NAMES` for this package's trainer.

    Raise UpstreamMovedError, with the version where this package does not run with it, or with each
    name that is gone or takes other arguments.
    """
    if (problem := version_problem(version())) is not None:
        raise UpstreamMovedError(problem)
    _name_undecided()
    moved = [line for private in names for line in _moved_from(private)]
    if not moved:
        return
    raise UpstreamMovedError(
        f"megatron-core ({version()}) must be {TESTED_VERSION}, or have the "
        f"private names that this package uses; {'; '.join(moved)}; "
        f"{how_to_install(f'megatron-core=={TESTED_VERSION}')}, or see docs/upgrading.md"
    )


def _name_undecided() -> None:
    """Name expert settings that are in no table (`refuse_ignored`)."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.core.utils import log_single_rank

    if names := ", ".join(undecided(MLATransformerConfig)):
        log_single_rank(
            logging.getLogger(__name__),
            logging.WARNING,
            f"megatron-core {version()} has settings of experts that this version of "
            f"moepp_megatron does not know, and which must keep their defaults: {names}",
        )


def _moved_from(private: _PrivateName) -> Iterator[str]:
    """The differences of one name from the tested version; empty if there are none."""
    module, _, place = private.path.partition(":")
    kind = place.rpartition(".")[0]
    what = f"{kind or module}.{private.name}"
    try:
        owner: Any = importlib.import_module(f"megatron.core.{module}")
        if kind:
            owner = getattr(owner, kind)
    except (ImportError, AttributeError):
        yield f"{module}.{kind} is gone"
        return
    method = None
    if not kind:
        is_there = hasattr(owner, private.name)
    elif private.use == "read":
        is_there = private.name in owner.__init__.__code__.co_names
    else:
        method = by_name(owner, private.name)
        is_there = method is not None
    if not is_there:
        yield f"{what} is gone ({private.reason})"
    elif method is not None:
        lacking = set(private.parameters.split()) - set(inspect.signature(method).parameters)
        if lacking:
            yield f"{what} has no {', '.join(sorted(lacking))} any more"
