"""The machines of a run: rendezvous addresses, and timeouts of waiting for each other."""

import contextlib
import ipaddress
import os
import socket
from dataclasses import dataclass

import psutil

from moepp_megatron.runtime.rank import RankEnvironment

_DEFAULT_PORT = 29500
# Addresses of no machine (RFC 5737, RFC 3849), to ask for the route to any other machine.
_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
# How much longer torchrun waits for the other machines than the launcher does.
_GRACE_S = 60


@dataclass(frozen=True)
class Nodes:
    """The machines of a run and this one among them.

    Attributes:
        rank: Number of this machine from 0, or None to let torchrun number them. Ranks are numbered
            in its order, so that neighbours in the cluster are neighbours in the rank grid.
        host: Machine where they meet; the first one, if they are numbered.
        run_id: Same for all machines of this run, different from any other at the same place.
        join_timeout_s: Seconds that machines wait for each other at the start.
        restart_timeout_s: Seconds that they wait for each other after a failure.
    """

    count: int
    rank: int | None
    host: str
    port: int = _DEFAULT_PORT
    run_id: str = "moepp"
    join_timeout_s: int = 900
    restart_timeout_s: int = 120

    def local_address(self) -> str:
        """The address by which the others reach this machine.

        Not the host's name: many machines map theirs to a loopback address. So does the first
        machine, for which `host` may be its own name: then the address by which it reaches others.
        """
        address = _address_towards(self.host, self.port)
        if not _is_loopback(address) or self.host == "localhost" or _is_loopback(self.host):
            return address
        for elsewhere in _ELSEWHERE:
            with contextlib.suppress(OSError):
                return _address_towards(elsewhere, self.port)
        return address

    def interface(self) -> str | None:
        """The network interface with `local_address`, or None if it is unknown."""
        address = self.local_address()
        for name, addresses in psutil.net_if_addrs().items():
            # IPv6 link-local addresses are listed as address%interface.
            if any(interface.address.partition("%")[0] == address for interface in addresses):
                return str(name)
        return None

    def torchrun_options(self) -> list[str]:
        """The options of torchrun for these machines."""
        # The launcher gives up first (`Meeting`), in one line and not in a traceback.
        longest = max(self.join_timeout_s, self.restart_timeout_s) + _GRACE_S
        settings = [f"join_timeout={longest}", f"timeout={self.join_timeout_s}"]
        if self.rank is not None:
            # torchrun would compare names, which misleads where machines have several.
            settings.append(f"is_host={int(self.rank == 0)}")
        return [
            f"--nnodes={self.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={_bracketed(self.host)}:{self.port}",
            f"--rdzv-id={self.run_id}",
            f"--rdzv-conf={','.join(settings)}",
            f"--local-addr={self.local_address()}",
        ]

    def moepp_options(self) -> list[str]:
        """The options of moepp's commands for these machines."""
        options = ["--nnodes", str(self.count)]
        if self.rank is not None:
            options += ["--node-rank", str(self.rank)]
        options += ["--rdzv-endpoint", f"{_bracketed(self.host)}:{self.port}"]
        options += ["--rdzv-id", self.run_id]
        return [*options, "--restart-timeout", str(self.restart_timeout_s)]


def interface_of_rank(rank: RankEnvironment) -> str | None:
    """The network interface of a rank towards the other machines; None for one or if unknown."""
    if rank.world_size == rank.local_world_size:
        return None
    host = os.environ.get("MASTER_ADDR") if rank.meets_at is None else rank.meets_at[0]
    if not host:
        return None
    try:
        return Nodes(rank.world_size, None, host).interface()
    except OSError:
        # Whoever needs the host says so.
        return None


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another one."""
    # Connecting a datagram socket sends nothing; it only chooses the route.
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    """True if `host` is a loopback address, not a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Split HOST, HOST:PORT or [IPV6]:PORT; ValueError if it does not have this form."""
    if endpoint.startswith("["):
        host, _, rest = endpoint[1:].partition("]")
        colon, port = rest[:1], rest[1:]
    else:
        host, colon, port = endpoint.partition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not host or (colon or port) and not (colon == ":" and is_port):
        raise ValueError(f"{endpoint!r} must be HOST or HOST:PORT")
    return host, int(port) if port else _DEFAULT_PORT


class Meeting:
    """Timeouts of this machine's rendezvous with the others.

    torchrun knows one time limit for every meeting of the machines. The first meeting may take
    long, because machines boot and load images. A later one follows a failure on machines that are
    all up, and every minute of waiting costs all of them.
    """

    def __init__(self, nodes: Nodes, now: float) -> None:
        self._nodes = nodes
        self._since: float | None = now
        self._had_ranks = False

    def failure(self, has_ranks: bool, now: float) -> str | None:
        """Explain why this machine gives up at `now` (seconds); None while it waits or trains.

        torchrun starts ranks when all machines have met, and none is left when it waits for others.
        """
        if has_ranks:
            self._had_ranks, self._since = True, None
            return None
        if self._since is None:
            self._since = now
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
