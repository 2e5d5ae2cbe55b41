"""FP8 contexts: a process-wide state, entered and left."""

import warnings
from contextlib import contextmanager

from transformer_engine.common.recipe import DelayedScaling


class FP8GlobalStateManager:
    fp8_enabled = False
    fp8_recipe = None
    fp8_group = None
    fp8_parameters = False
    high_precision_init_val = False

    @classmethod
    def is_fp8_enabled(cls):
        return cls.fp8_enabled

    @classmethod
    def with_fp8_parameters(cls):
        return cls.fp8_parameters

    @classmethod
    def with_high_precision_init_val(cls):
        return cls.high_precision_init_val

    @classmethod
    def get_fp8_recipe(cls):
        return DelayedScaling() if cls.fp8_recipe is None else cls.fp8_recipe

    @classmethod
    def get_autocast_state(cls):
        return cls.fp8_enabled, cls.fp8_recipe, cls.fp8_group

    @classmethod
    def set_autocast_state(cls, state):
        cls.fp8_enabled, cls.fp8_recipe, cls.fp8_group = state


def get_align_size_for_quantization(recipe):
    return 16


class autocast:  # noqa: N801
    def __init__(
        self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False
    ):
        assert not calibrating
        self.state = (enabled, recipe, amax_reduction_group)

    def __enter__(self):
        self.before = FP8GlobalStateManager.get_autocast_state()
        FP8GlobalStateManager.set_autocast_state(self.state)
        return self

    def __exit__(self, *exception):
        FP8GlobalStateManager.set_autocast_state(self.before)


def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    warnings.warn("fp8_autocast is deprecated", DeprecationWarning, stacklevel=2)
    return autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph)


@contextmanager
def quantized_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    state = FP8GlobalStateManager
    before = state.fp8_parameters, state.fp8_recipe, state.high_precision_init_val
    state.fp8_parameters, state.fp8_recipe = enabled, recipe
    state.high_precision_init_val = preserve_high_precision_init_val
    try:
        yield
    finally:
        state.fp8_parameters, state.fp8_recipe, state.high_precision_init_val = before


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    warnings.warn("fp8_model_init is deprecated", DeprecationWarning, stacklevel=2)
    with quantized_model_init(enabled, recipe, preserve_high_precision_init_val):
        yield
