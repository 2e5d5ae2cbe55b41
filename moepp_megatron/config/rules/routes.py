"""Rules of the section `routes`."""

from __future__ import annotations

from moepp_megatron.config.rules.rows import Rule, group, refuse

RULES: tuple[Rule, ...] = (
    group(lambda c: c.routes.replay is not None,
        refuse("routes.replay", lambda c: c.routes.replay == c.routes.record,
            "must be another folder than routes.record", "write to another one"),
        refuse("routes.replay",
            lambda c: c.moe.budget.held_by != "none" or c.moe.bias_update_rate > 0,
            "must be null with a controller of selections (moe.budget.controller, "
            "moe.bias_update_rate): given routes do not follow it",
            "leave it out, or use moe.budget.controller=none and moe.bias_update_rate=0"),
    ),
)  # fmt: skip
