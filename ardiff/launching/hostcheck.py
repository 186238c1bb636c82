"""What one host says of itself before a job starts there, and whether it reaches the first host. Runs on that host.

Light on purpose: every host runs it before every start.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ardiff.launching import devices
from ardiff.ports import free_port

ANSWER = "ARDIFF-ANSWER "  # begins the one line that is meant for the caller: login shells may print others
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "deepspeed")
TOKEN = "token"  # the file that shows that a folder is shared
TOKEN_PATIENCE = 5.0  # seconds: network file systems show new files late
_SOURCES = ("ardiff/**/*.py", "ardiff/presets/*.yaml", "launch/*.py", "data_tools/**/*.py", "ds_configs/*.json")
_VIRTUAL = ("lo", "docker", "virbr", "br-", "veth", "cni", "flannel", "podman")
_SIOCGIFADDR = 0x8915


def facts(shared: Path | None, token: str, folder: Path | None = None) -> dict[str, Any]:
    """What all hosts of a job have to have in common, and what they have of their own.

    shared: where all see a file with that token. folder: where the programs are to run.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "source": source(),
        "commit": _commit(),
        "gpus": devices.gpus(),
        "shared": shared is None or _sees(shared / TOKEN, token),
        "folder": folder is None or folder.is_dir(),
        "port": free_port(""),
        "resolves_to": resolve(socket.gethostname()),  # where gloo listens, unless GLOO_SOCKET_IFNAME is set
        "interfaces": interfaces(),
        "address": (os.environ.get("SSH_CONNECTION", "").split() or ["", "", ""])[2],  # where ssh reached it
    }


def source() -> str:
    """A digest of all program files and settings of the clone."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in ROOT.glob(pattern)}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def interfaces() -> dict[str, str]:
    """Network interfaces and their IPv4 addresses, without loopback and those of containers."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            if not name.startswith(_VIRTUAL):
                with contextlib.suppress(OSError):  # it has none
                    answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    found[name] = socket.inet_ntoa(answer[20:24])
    return found


def resolve(name: str) -> list[str]:
    """The addresses of a host's name as seen from here."""
    try:
        return list(
            dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        )
    except OSError:
        return []


def is_loopback(address: str) -> bool:
    """Whether it only reaches the machine that uses it."""
    return address.startswith("127.") or address == "::1"


def listen(port: int, token: str, visitors: int, seconds: float) -> dict[str, Any]:
    """On the first host: answer with the token, until all visitors have been here or the time is over."""
    until = time.monotonic() + seconds
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            return {"error": f"port {port}: {error.strerror}"}
        server.listen(visitors)
        while visitors and time.monotonic() < until:
            server.settimeout(max(0.1, until - time.monotonic()))
            with contextlib.suppress(OSError):
                visitor, _ = server.accept()
                with visitor:
                    visitor.settimeout(seconds)
                    visitor.sendall(f"{token}\n".encode())
                    visitors -= visitor.recv(1) == b"!"  # that it was looked for here, and found
    return {}


def visit(names: list[str], port: int, token: str, seconds: float) -> dict[str, Any]:
    """On the others: which of these names and addresses of the first host lead there; the first one ends the search."""
    until = time.monotonic() + seconds
    tried: dict[str, str] = {}
    while True:
        addresses = [address for name in names for address in resolve(name) or [name]]
        for address in sorted(dict.fromkeys(addresses), key=is_loopback):  # for others it leads elsewhere
            try:
                _shake_hands(address, port, token)
                return {"reached": address}
            except OSError as error:
                tried[address] = f"{address}: {error.strerror or error}"
        if time.monotonic() > until:
            return {"error": "; ".join(tried.values())}
        time.sleep(0.3)


def _shake_hands(address: str, port: int, token: str) -> None:
    with socket.create_connection((address, port), timeout=3) as connection, connection.makefile() as answer:
        if answer.readline().strip() != token:
            raise OSError("somebody else answers there")
        connection.sendall(b"!")


def _sees(file: Path, token: str) -> bool:
    until = time.monotonic() + TOKEN_PATIENCE
    while True:
        with contextlib.suppress(OSError):
            list(file.parent.iterdir())  # has the folder looked up again
            if file.read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main() -> None:
    """Answer one question on one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("question", choices=("facts", "listen", "visit"))
    parser.add_argument("--token", required=True)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--visitors", type=int, default=0)
    parser.add_argument("--names", nargs="*", default=[])
    options = parser.parse_args()
    if options.question == "facts":
        answer = facts(options.shared, options.token, options.folder)
    elif options.question == "listen":
        answer = listen(options.port, options.token, options.visitors, options.seconds)
    else:
        answer = visit(options.names, options.port, options.token, options.seconds)
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
