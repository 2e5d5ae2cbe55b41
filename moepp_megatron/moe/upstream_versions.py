"""The versions of megatron-core that this package runs with, and all that differs between them.

No other file asks for the version. docs/upgrading.md has the differences that need no code.
"""

from typing import Any

from moepp_megatron.runtime.optional import how_to_install

TESTED_VERSION = "0.19.2"
"""Version that tests run with (constraints.txt)."""
OLDEST, BEYOND = "0.19.2", "0.21"

RENAMED = {"_forward_post_mlp": "_apply_mlp_bda_step"}
"""Names with an underscore of 0.19, and what 0.20 calls them."""
NEW_FIELDS = frozenset(
    {
        "enable_mhc_connections",
        "moe_combine_bwd_dtype",
        "moe_dispatch_fwd_dtype",
        "moe_use_grouped_tensor",
        "mtp_hsm",
    }
)
"""Settings of `TransformerConfig` that 0.19 does not have."""
GONE_FIELDS = frozenset({"moe_ncclep_static_shape"})
"""Settings that 0.20 no longer has."""


def version() -> str:
    """The version of the megatron-core that is imported, such as 0.20.0."""
    # Not above: `moepp doctor` asks for the tested version where megatron-core is missing.
    from megatron.core import package_info

    return str(package_info.__shortversion__)


def version_problem(found: str | None) -> str | None:
    """Explain in one line why this package does not run with a version, or without; or None."""
    oldest, numbers, beyond = (
        tuple(map(int, text.split("."))) for text in (OLDEST, found or "0", BEYOND)
    )
    if oldest <= numbers < beyond:
        return None
    return (
        f"megatron-core ({found or 'not installed'}) must be at least {OLDEST} and below {BEYOND}; "
        f"{how_to_install(f'megatron-core=={TESTED_VERSION}')}"
    )


def refuse_elsewhere(name: str, value: Any, allowed: str, reason: str) -> None:
    """Raise ValueError for a setting that only the tested version of megatron-core honours."""
    if version() != TESTED_VERSION:
        raise ValueError(
            f"TransformerConfig.{name} ({value}) must be {allowed} with megatron-core {version()}, "
            f"because {reason}; use {allowed}, or see docs/upgrading.md"
        )


def by_name(owner: Any, name: str) -> Any:
    """An attribute of megatron-core's by its name in 0.19; None where it has neither name."""
    return getattr(owner, RENAMED.get(name, name), None) or getattr(owner, name, None)
