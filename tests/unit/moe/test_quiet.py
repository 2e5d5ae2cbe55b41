"""megatron-core's untrue warnings about the FFN experts' layers, in the library as pinned."""

import warnings

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.runtime.optional import quiet


def _said_of_an_expert():
    """An expert's first layer on one expert-tensor rank, in a model with sequence parallelism."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    with warnings.catch_warnings(record=True) as caught:
        ColumnParallelLinear(
            8,
            8,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=False,
            is_expert=True,
            tp_group=parallel_state.get_expert_tensor_parallel_group(),
        )
    return [str(warning.message) for warning in caught if "sequence" in str(warning.message)]


def test_an_untrue_warning_about_sequence_parallelism_is_silenced():
    """By its text: as soon as the library words it otherwise, the first half fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # As in pyproject.toml, whose filters this test takes off.
        warnings.filterwarnings("ignore", "full scope is deprecated")
        (said,) = _said_of_an_expert()
        assert "Disabling sequence parallel" in said
        quiet()
        assert _said_of_an_expert() == []


def test_other_warnings_are_heard():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        quiet()
        with pytest.warns(UserWarning, match="sequence length"):
            warnings.warn("sequence length must be even", stacklevel=1)
