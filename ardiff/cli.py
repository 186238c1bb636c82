"""What all programs share: the way a user's mistake is reported, and `--config` with dotted overrides."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ardiff.config import Config, load, presets
from ardiff.errors import EchoedError, UserError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2

# A full or read-only disk, missing permissions and wrong paths are not bugs of the program.
_USERS_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program: a UserError becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    try:
        code = main()
    except BrokenPipeError:  # `program | head`: whoever read us has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
        if mistake is None:
            raise
        complain(mistake)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def complain(error: UserError) -> None:
    """Print a user's mistake, with the rank where it is not the first one's; what is known to all is told once."""
    rank = os.environ.get("RANK", "0")
    if not isinstance(error, EchoedError):
        print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr)


def as_user_error(error: BaseException) -> UserError | None:
    """The error as a user's mistake, if it is one: a UserError, or a disk or path that does not do what it should."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        return UserError(f"{error.filename or 'writing'}: {error.strerror}")
    return None


def parser(description: str, example: str, default_config: str | None = None) -> argparse.ArgumentParser:
    """An argument parser whose help ends with an example; with `default_config` it has --config as well."""
    result = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if default_config:
        result.add_argument(
            "--config",
            default=default_config,
            metavar="PRESET_OR_YAML",
            help=f"a YAML file or one of: {', '.join(presets())} (default {default_config}); any setting can be "
            "overridden, as in --train.max_steps 100",
        )
    return result


def parse_with_config(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """Parse the command line; what the parser does not know must be an override of the configuration."""
    options, overrides = arguments.parse_known_args()
    known = [name for action in arguments._actions for name in action.option_strings]
    for word in overrides:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name:  # settings have a dot, so this is a mistyped option
            nearest = difflib.get_close_matches(name, known, 1)
            if nearest:
                raise UserError(f"unknown option '{name}'; did you mean '{nearest[0]}'?")
    return options, load(options.config, overrides)
