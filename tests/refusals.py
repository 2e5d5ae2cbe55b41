"""What a configuration that is refused raises."""

import pytest

from moepp_megatron.config.errors import ConfigError


def config_error(match):
    return pytest.raises(ConfigError, match=match)
