"""Ports for servers that get theirs and bind it later."""

import os
import random
import socket

# Below those that the kernel gives to connections, which would take one before its server does.
_PORTS = range(10_000, 30_000)


def free_port():
    """A port that nothing listens on; other processes of the tests draw other ones."""
    draw = random.Random(os.urandom(8))
    while True:
        port = draw.choice(_PORTS)
        with socket.socket() as probe:
            # 0: somebody answers.
            if probe.connect_ex(("127.0.0.1", port)):
                return port
