"""The error that a refused configuration raises."""

from contextlib import contextmanager

import pytest

from moepp_megatron.config.errors import ConfigError


def config_error(match):
    return pytest.raises(ConfigError, match=match)


@contextmanager
def config_line(match):
    """The same, whose message is one line."""
    with config_error(match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def refusal(function, *arguments):
    """The message of the error that a call is refused with."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)
