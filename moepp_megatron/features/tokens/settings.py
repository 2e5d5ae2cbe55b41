"""Settings of measurements by token in the section `observe`."""

from moepp_megatron.config.schema.section import Section


class TokenSettings(Section):
    """Classes of tokens, and data sources."""

    token_groups: bool = True
    """Measure FFN experts by class of tokens, and loss, FFN share and use of the experts by data
    source where the prepared data have several"""
