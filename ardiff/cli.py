"""What all programs share: the way a user's mistake is reported, and `--config` with dotted overrides."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ardiff.config import Config, load, presets
from ardiff.errors import UserError

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2

# A full or read-only disk and missing permissions are not bugs of the program.
_USERS_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program: a UserError becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    try:
        code = main()
    except UserError as error:
        complain(error)
        code = EXIT_USER_ERROR
    except BrokenPipeError:  # `program | head`: whoever read us has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    except OSError as error:
        if error.errno not in _USERS_ERRNOS:
            raise
        complain(UserError(f"{error.filename or 'writing'}: {error.strerror}"))
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def complain(error: UserError) -> None:
    """Print a user's mistake; of several ranks only the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)


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
    return options, load(options.config, overrides)
