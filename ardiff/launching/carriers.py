"""What carries a command to a host: ssh, or pdsh over ssh; one process here for every host.

One process for each host, and not one for all of them, because only then it is seen which host was lost, and when.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ardiff.errors import UserError

CARRIERS = ("ssh", "pdsh", "srun")
CONNECT_SECONDS = 10
# A host that does not answer three times in a row, ten seconds each, is lost. A connection that is shared with other
# commands (ControlMaster in the user's settings) would not notice, and would outlive the command.
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", "-o", "ControlPath=none"),
    *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"),
)
LOST = 255  # what ssh ends with where the connection failed
JOB = "ARDIFF_JOB"  # marks every process of a job, on any host


class Carrier(Protocol):
    """How a shell line gets to a host. Standard output and error of the line come back, and its exit code."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def forwards_stdin(self) -> bool:
        """Without it, what the line has to read is put into a file that all hosts see."""
        ...

    def command(self, host: str, line: str) -> list[str]:
        """The words to be run here so that a POSIX shell on `host` runs `line`."""
        ...

    def environment(self) -> dict[str, str]:
        """What that command needs besides the variables of this process."""
        ...

    def lost(self, code: int) -> bool:
        """Whether this exit code of that command means that the connection failed, not the line."""
        ...


@dataclass(frozen=True)
class Ssh:
    """OpenSSH. It must not need to ask for anything: BatchMode."""

    arguments: tuple[str, ...] = ()  # of the user; ssh takes the first value it is given for an option
    name: str = "ssh"
    forwards_stdin: bool = True

    def command(self, host: str, line: str) -> list[str]:
        """ssh ... HOST LINE."""
        return ["ssh", *self.arguments, "-T", *SSH_OPTIONS, host, line]

    def environment(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def lost(self, code: int) -> bool:
        """Ssh ends with 255, and so does no program of ours."""
        return code == LOST


@dataclass(frozen=True)
class Pdsh:
    """pdsh with its ssh module. It forwards no standard input."""

    arguments: tuple[str, ...] = ()  # for ssh
    name: str = "pdsh"
    forwards_stdin: bool = False

    def command(self, host: str, line: str) -> list[str]:
        """pdsh ... -w HOST LINE. -S: the exit code of the line; -N: no host names, which we add to both streams."""
        return ["pdsh", "-R", "ssh", "-S", "-N", "-w", host, line.replace("%", "%%")]  # %h, %n, %u are replaced

    def environment(self) -> dict[str, str]:
        """The options of ssh; those of the user come first."""
        given = os.environ.get("PDSH_SSH_ARGS_APPEND", "").split()
        return {"PDSH_SSH_ARGS_APPEND": " ".join([*self.arguments, *given, *SSH_OPTIONS])}

    def lost(self, code: int) -> bool:
        """With -S it ends as ssh does."""
        return code == LOST


def carrier(name: str, ssh_args: str, for_show: bool = False) -> Carrier:
    """The carrier of that name. Raises UserError where it is not installed, unless it is only to be shown."""
    for program in {name, "ssh"}:
        if shutil.which(program) is None and not for_show:
            raise UserError(f"--carrier {name}: {program} is not in PATH; install it")
    try:
        arguments = tuple(shlex.split(ssh_args))
    except ValueError as error:
        raise UserError(f"--ssh_args {ssh_args}: {error}") from None
    if name == "ssh":
        return Ssh(arguments)
    if parted := [word for word in arguments if len(word.split()) != 1]:  # it parts them at spaces, whatever the quotes
        raise UserError(f"--ssh_args: pdsh cannot pass {shlex.quote(parted[0])} on; put it into ~/.ssh/config")
    return Pdsh(arguments)


def shell_line(folder: Path, words: Sequence[str], variables: dict[str, str]) -> str:
    """Run `words` in `folder` with these variables, which everybody on the host can see, in place of the shell."""
    given = [f"{name}={value}" for name, value in variables.items()]
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *given, *words])}"
