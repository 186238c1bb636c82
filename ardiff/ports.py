"""TCP ports of this machine."""

from __future__ import annotations

import socket


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now; address: "" for all interfaces."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
