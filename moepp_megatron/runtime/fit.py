"""Whether this machine can do what a sound configuration asks for."""

from __future__ import annotations

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.runtime.optional import flex_backend, have_triton


def check_fit(config: Config) -> None:
    """Refuse what would fail in the middle of starting; needs no process group.

    Raises:
        UnfitError: With the name, the value, the rule and a remedy.
    """
    if config.moe.dispatcher == "flex" and flex_backend() is None:
        raise UnfitError(
            "moe.dispatcher (flex) must have a GPU and the package deep_ep (DeepEP or its "
            "hybrid-ep branch), which this machine lacks; use alltoall"
        )
    if config.moe.fused is True and not have_triton():
        raise UnfitError(
            "moe.fused (true) must have a GPU and the package triton, which this machine lacks; "
            "use auto"
        )
