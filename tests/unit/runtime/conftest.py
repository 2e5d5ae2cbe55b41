"""What is known of optional packages, anew for tests that put some in place."""

import functools

import pytest

from moepp_megatron.runtime import optional


@pytest.fixture
def forget_packages():
    """Has optional packages looked for again; at the end, too."""
    known = [f for f in vars(optional).values() if isinstance(f, functools._lru_cache_wrapper)]

    def forget():
        for function in known:
            function.cache_clear()

    yield forget
    forget()
