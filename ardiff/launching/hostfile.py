"""Hosts and how many ranks each takes: DeepSpeed's hostfile format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ardiff.errors import UserError

# What ssh and pdsh take for a host and nothing else: no option, list, range or pattern.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:%-]*")


@dataclass(frozen=True)
class Host:
    """A host by the name that it is reached under."""

    name: str
    slots: int  # ranks, one for every GPU


def read(path: Path) -> list[Host]:
    """The hosts of a file with lines `name slots=N`; comments (#) and blank lines are left out.

    Raises UserError with the line for anything else, for a name that comes twice, and where there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--hostfile {path}: is no text") from None
    except OSError as error:
        raise UserError(f"--hostfile {path}: {error.strerror}") from None
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"{path}, line {number}"
        found = re.fullmatch(r"slots=(\d+)", words[1]) if len(words) == 2 else None
        if found is None:
            raise UserError(f"{place}: '{line.strip()}' is not of the form 'name slots=N'")
        if int(found[1]) < 1:
            raise UserError(f"{place}: slots={found[1]}: must be at least 1; leave the line out instead")
        _check(words[0], place)
        if words[0] in names(hosts):
            raise UserError(f"{place}: {words[0]} is there twice; give it all its slots in one line")
        hosts.append(Host(words[0], int(found[1])))
    if not hosts:
        raise UserError(f"{path}: has no hosts; lines are of the form 'name slots=N'")
    return hosts


def read_spares(text: str, hosts: list[Host]) -> list[Host]:
    """Spare hosts: a hostfile, or names separated by commas, which have as many slots as the first host.

    Raises UserError as `read` does, and for a spare that is one of `hosts`.
    """
    if Path(text).is_file():
        spares = read(Path(text))
    else:
        given = [name for name in text.split(",") if name]
        for name in given:
            _check(name, f"--spares {text}: no such file, and no list of hosts")
        spares = [Host(name, hosts[0].slots) for name in dict.fromkeys(given)]
    for spare in spares:
        if spare.name in names(hosts):
            raise UserError(f"--spares: {spare.name} is one of the hosts of the job already")
    return spares


def names(hosts: Iterable[Host]) -> list[str]:
    """Their names."""
    return [host.name for host in hosts]


def in_place_of(host: Host, spares: list[Host]) -> Host | None:
    """The first spare with as many slots as `host` at least; it takes as many ranks."""
    found = next((spare for spare in spares if spare.slots >= host.slots), None)
    return found and replace(found, slots=host.slots)


def _check(name: str, place: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{place}: '{name}' is not the name of a host")
