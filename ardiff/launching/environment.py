"""Which variables of this process travel to the hosts of a job: those listed here, and those named by the user."""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ardiff.errors import UserError

# Settings of libraries that have to be equal on all ranks, and where libraries lie. Not PATH, HOME, or what is about
# a host, as CUDA_VISIBLE_DEVICES is: each host has its own.
PASSED = (
    *("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "UCX_*", "DS_*", "DEEPSPEED_*", "TRITON_*", "ARDIFF_*"),
    *("OMP_*", "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING"),
    *("PYTHON*", "LD_LIBRARY_PATH"),
)
_NEVER = ("ARDIFF_SUPERVISOR", "ARDIFF_JOB", "PYTHONHOME")  # they are about a process, or an installation
_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|(?:^|_)KEY(?:$|_)|_PAT$", re.IGNORECASE)
HIDDEN = "***"


@dataclass(frozen=True)
class Variables:
    """Variables for all ranks, and which of them are nobody else's business."""

    values: Mapping[str, str] = field(default_factory=dict)
    secret: frozenset[str] = frozenset()

    def shown(self) -> list[str]:
        """NAME=value as for a shell, secrets hidden."""
        return [
            f"{name}={HIDDEN if name in self.secret else shlex.quote(value)}"
            for name, value in sorted(self.values.items())
        ]


def collect(environment: Mapping[str, str], named: Sequence[str], file: Path | None) -> Variables:
    """What travels: those of `environment` that PASSED lists, those `named` (which have to be there), and a file's.

    Raises UserError for a name that is not set and for a file that cannot be taken.
    """
    listed = {
        name: value
        for name, value in environment.items()
        if name not in _NEVER and any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED)
    }
    for name in named:
        if "=" in name:
            raise UserError(f"--pass_env {name.partition('=')[0]}=...: takes a name; values go into --env_file FILE")
        if name not in environment:
            raise UserError(f"--pass_env {name}: is not set here; export it, or put it into --env_file FILE")
        listed[name] = environment[name]
    private = False
    from_file: dict[str, str] = {}
    if file is not None:
        from_file, private = read_file(file)
    values = {**listed, **from_file}
    return Variables(
        values, frozenset(name for name in values if _SECRET.search(name) or (private and name in from_file))
    )


def read_file(path: Path) -> tuple[dict[str, str], bool]:
    """The variables of a file with lines NAME=value, and whether nobody else may read it.

    Comments (#) and blank lines are left out, a value may be in quotes; without them it ends at " #". Raises
    UserError for other lines, and for what looks like a secret in a file that others can read.
    """
    try:
        text, mode = path.read_text(encoding="utf-8"), path.stat().st_mode
    except UnicodeDecodeError:
        raise UserError(f"--env_file {path}: is no text") from None
    except OSError as error:
        raise UserError(f"--env_file {path}: {error.strerror}") from None
    private = mode & 0o077 == 0
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip().removeprefix("export ").strip()
        if not words or words.startswith("#"):
            continue
        name, equals, value = words.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name)):
            raise UserError(f"{path}, line {number}: is not of the form NAME=value")  # the line itself may be a secret
        if _SECRET.search(name) and not private:
            raise UserError(f"{path}, line {number}: {name} can be read by others; chmod 600 {path}")
        found[name] = _unquoted(value.strip())
    return found, private


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else re.split(r"\s#", value, maxsplit=1)[0].rstrip()
