"""The time that a machine waits for the other machines of a run."""

from __future__ import annotations

from moepp_megatron.runtime.nodes import Nodes


class Meeting:
    """Decides when this machine has waited long enough for the others.

    torchrun knows one time limit for every meeting of the machines. The first meeting may take
    long, because machines boot and load images. A later one follows a failure on machines that are
    all up, and every minute of waiting costs all of them.
    """

    def __init__(self, nodes: Nodes, now: float) -> None:
        self._nodes = nodes
        self._since: float | None = now
        self._had_ranks = False

    def observe(self, has_ranks: bool, now: float) -> None:
        """Tell whether ranks run on this machine at time `now` in seconds.

        torchrun starts ranks when all machines have met, and none is left when it waits for others.
        """
        if has_ranks:
            self._had_ranks, self._since = True, None
        elif self._since is None:
            self._since = now

    def failure(self, now: float) -> str | None:
        """Why this machine gives up at time `now` in seconds; None as long as it waits."""
        if self._since is None:
            return None
        nodes = self._nodes
        limit = nodes.restart_timeout_s if self._had_ranks else nodes.join_timeout_s
        if now - self._since <= limit:
            return None
        if self._had_ranks:
            return (
                f"the other machines did not come back within {limit} s after a failure "
                "(--restart-timeout)"
            )
        return f"the {nodes.count} machines did not meet at {nodes.host} within {limit} s"
