"""Each setting that names what is built names exactly what a registry can build."""

from typing import get_args

from moepp_megatron.config import Config
from moepp_megatron.config.choices import pick
from moepp_megatron.config.plugins import plugin_of
from moepp_megatron.data.datasets import DATASETS
from moepp_megatron.moe.dispatcher import DEDUPLICATING, DISPATCHERS
from moepp_megatron.training.optimizers import OPTIMIZERS
from moepp_megatron.training.schedule import SCHEDULES
from tests.refusals import config_error


def allowed(section, key):
    """Return the values that the configuration accepts for a setting."""
    fields = Config.model_fields[section].annotation.model_fields
    annotation = fields[key].annotation
    # With plugins it is a union of the package's own names and text.
    own, *_ = get_args(annotation) if plugin_of(annotation) else (annotation,)
    return set(get_args(own))


def test_settings_and_registries_have_the_same_names():
    assert allowed("optimizer", "kind") == set(OPTIMIZERS)
    assert allowed("optimizer", "decay_style") == set(SCHEDULES)
    assert allowed("data", "dataset") == set(DATASETS)
    dispatchers = {*DISPATCHERS, *(f"{name}_dedup" for name in DEDUPLICATING)}
    assert allowed("moe", "dispatcher") == dispatchers


def test_an_unknown_name_is_answered_with_the_known_ones():
    with config_error(r"^a.b \(c\) must be one of x, y; use one of these$"):
        pick({"x": 1, "y": 2}, "a.b", "c")
