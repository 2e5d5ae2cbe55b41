"""Builds ranks of layouts in a process of its own: a process has one set of groups at a time."""

WORLD = 1024


def build(raw, ranks):
    """Each rank as built, and its comparisons."""
    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.tools.planning.built_rank import build_rank, check_rank

    config = parse_config(raw)
    layout = Layout.from_config(config, WORLD)
    found = []
    for rank in ranks:
        built = build_rank(config, layout, rank)
        found.append((built, check_rank(config, layout, built)))
    return found
