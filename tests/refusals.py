"""The error that a refused configuration raises."""

import pytest

from moepp_megatron.config.errors import ConfigError


def config_error(match):
    return pytest.raises(ConfigError, match=match)
