"""What all programs share: the way a user's mistake is reported, and `--config` with dotted overrides."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ardiff.errors import EchoedError, UserError

if TYPE_CHECKING:
    from ardiff.config import Config  # takes longer to load than all the rest: only by programs that need it

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_HUNG = 3  # a rank made no progress for train.hang_minutes
EXIT_INTERRUPTED = 130  # Ctrl-C before there was anything to stop in an orderly way
PATIENCE = 5.0  # seconds that rank 0 has for telling a mistake before the other ranks end

# A full or read-only disk, missing permissions and wrong paths are not bugs of the program.
USERS_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
}


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program: a UserError becomes one line on stderr and exit code 2, Ctrl-C becomes 130."""
    try:
        code = main()
    except BrokenPipeError:  # `program | head`: whoever read us has gone
        _mute(sys.stdout)
        code = EXIT_OK
    except (UserError, OSError) as error:
        mistake = as_user_error(error)
        if mistake is None:
            raise
        complain(mistake)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        _print("interrupted", sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def say(line: str) -> None:
    """Print a line of progress. Whoever read us may have gone (`program | head`), or a log's disk be full: the work
    goes on without being watched.
    """
    _print(line, sys.stdout)


def complain(error: UserError) -> None:
    """Print a user's mistake, with the rank where it is not the first one's; what is known to all is told once. Where
    nobody hears it (a closed stderr, a full disk), the exit code still tells.
    """
    if not isinstance(error, EchoedError):
        _print(f"error: {error}" if _is_main() else f"error: rank {os.environ['RANK']}: {error}", sys.stderr)


def _print(line: str, stream: TextIO | None) -> None:
    if stream is None or stream.closed:  # None: it was closed before the program began, as by 2>&-
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:
        _mute(stream)


def _mute(stream: TextIO | None) -> None:
    """Send what a stream still holds nowhere: Python would write it at the end, fail again, and exit with 120."""
    if stream is not None:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def as_user_error(error: BaseException) -> UserError | None:
    """The error as a user's mistake, if it is one: a UserError, or a disk or path that does not do what it should."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in USERS_ERRNOS:
        return UserError(f"{error.filename or 'writing'}: {error.strerror}")
    return None


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are UserErrors: one line with what is wrong and the nearest that would be right.

    takes_settings: words with a dot, such as --train.max_steps, are overrides of a configuration.
    """

    def __init__(self, *arguments: Any, takes_settings: bool = False, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.takes_settings = takes_settings
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As in argparse."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse; several words of one positional argument need not be together."""
        scattered = any(not action.option_strings and action.nargs in ("+", "*") for action in self._actions)
        parse = self.parse_known_intermixed_args if scattered else self.parse_known_args
        self._words = list(sys.argv[1:] if args is None else args)
        options, rest = parse(args, namespace)
        if rest:
            self._refuse(rest, options)
        return options

    def error(self, message: str) -> NoReturn:
        """Raise UserError for what argparse complains of; an option that does not exist is the likelier cause."""
        raise _same_on_all_ranks(self._mistyped() or self._clear(" ".join(message.splitlines())))

    def print_help(self, file: Any = None) -> None:
        """Once for all ranks."""
        if _is_main():
            super().print_help(file)

    def nearest_to(self, name: str) -> str | None:
        """The option that a mistyped one may stand for."""
        return _nearest(name, self._names())

    def _names(self) -> list[str]:
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [name for action in shown for name in action.option_strings]

    def _commands(self) -> list[Any]:
        """The actions that stand for subcommands: none or one."""
        return [action for action in self._actions if action.nargs == argparse.PARSER]

    def _mistyped(self) -> str | None:
        """The first option on the command line that does not exist; those of a subcommand are its parser's to judge."""
        commands = {name for action in self._commands() for name in action.choices}
        for word in self._words:
            if word in commands or word == "--":
                return None
            name = word.partition("=")[0]
            if not re.match(r"--?[A-Za-z]", name) or " " in name or name in self._option_string_actions:
                continue
            if not (self.takes_settings and "." in name):
                return _unknown(name, self._names())
        return None

    def _refuse(self, rest: Sequence[str], options: Any) -> NoReturn:
        """Raise UserError for the words that nothing on the command line takes."""
        word = next((word for word in rest if word.startswith("-")), None)
        if word is None:
            raise _same_on_all_ranks(f"unexpected argument '{rest[0]}'; see --help")
        known = self._names()
        for action in self._commands():
            command = getattr(options, action.dest)
            known = [*known, *action.choices[command]._names()]
            if word in known:
                raise _same_on_all_ranks(f"'{word}' must come after '{command}'")
        raise _same_on_all_ranks(_unknown(word, known))

    def _clear(self, message: str) -> str:
        """A complaint of argparse in words that say what to do."""
        complaints: dict[str, Callable[..., str]] = {
            r"the following arguments are required: (.*)": lambda names: self._missing(names.split(", "), ""),
            r"one of the arguments (.*) is required": lambda names: self._missing(names.split(), "one of "),
            r"argument (\S+): expected (?:one|at least one|\d+) arguments?": self._without_value,
            r"argument (\S+): invalid choice: '?(.*?)'? \(.*\)": self._not_a_choice,
            r"argument (\S+): invalid (\w+) value: '(.*)'": _not_a_value,
            r"argument (\S+): not allowed with argument (\S+)": "{1} and {0}: only one of them can be given".format,
            r"argument (\S+): ignored explicit argument (.*)": "{0}: takes no value, found {1}".format,
        }
        for pattern, in_words in complaints.items():
            if found := re.fullmatch(pattern, message):
                return in_words(*found.groups())
        return f"{message}; see --help"

    def _missing(self, names: Sequence[str], quantity: str) -> str:
        return f"missing {quantity}{' and '.join(map(self._described, names))}; see --help"

    def _without_value(self, name: str) -> str:
        action = self._action(name)
        metavar = action.metavar if action and isinstance(action.metavar, str) else "VALUE"
        return f"{name}: needs a value, as in '{name} {metavar}'; see --help"

    def _not_a_choice(self, name: str, word: str) -> str:
        action = self._action(name)
        choices = list(map(str, action.choices or ())) if action else []
        nearest = _nearest(word, choices)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        what = f"unknown command '{word}'" if action in self._commands() else f"{name} {word}"
        return f"{what}: must be one of {', '.join(choices)}{hint}"

    def _action(self, name: str) -> argparse.Action | None:
        """The one that argparse calls so in its complaints."""
        for action in self._actions:
            if name in ("/".join(action.option_strings), action.metavar, action.dest) or name in action.option_strings:
                return action
        return None

    def _described(self, name: str) -> str:
        """An option or argument with the name of its value and what it is."""
        action = self._action(name)
        if action is None:
            return name
        if action in self._commands():
            return f"{name} (one of {', '.join(action.choices or ())})"
        shape = f"{name} {action.metavar}" if action.option_strings and isinstance(action.metavar, str) else name
        return f"{shape} ({action.help})" if action.help and "%" not in action.help else shape


def parser(description: str, example: str, default_config: str | None = None) -> Parser:
    """An argument parser whose help ends with an example; with `default_config` it has --config as well."""
    result = Parser(
        prog=_started_as(),
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        takes_settings=default_config is not None,
    )
    if default_config:
        from ardiff.config import presets

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
    from ardiff.config import load

    options, overrides = parse_with_overrides(arguments)
    return options, load(options.config, overrides)


def parse_with_overrides(arguments: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what the parser does not know are overrides of a configuration, returned as words."""
    assert isinstance(arguments, Parser)
    options, overrides = arguments.parse_known_args()
    named = False  # by the word before: this one is the value of a setting
    for word in overrides:
        name, equals, _ = word.partition("=")
        nearest = arguments.nearest_to(name) if name.startswith("--") and "." not in name else None
        if nearest:  # settings have a dot, so this is a mistyped option
            raise _same_on_all_ranks(f"unknown option '{name}'; did you mean '{nearest}'?")
        if not (named or equals or name.startswith("--")):
            raise _same_on_all_ranks(f"unexpected argument '{word}'; see --help")
        named = name.startswith("--") and not equals
    return options, overrides


def _started_as() -> str | None:
    """How the program was started, for its usage: as a module (which argparse does not know) or, None, as a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else None


def _unknown(word: str, known: Iterable[str]) -> str:
    name = word.partition("=")[0]
    nearest = _nearest(name, known)
    return f"unknown option '{name}'; " + (f"did you mean '{nearest}'?" if nearest else "see --help")


def _nearest(word: str, known: Iterable[str]) -> str | None:
    known = list(known)
    begin_so = [name for name in known if len(word.strip("-")) > 1 and name.startswith(word)]
    return next(iter([*begin_so, *difflib.get_close_matches(word, known, 1)]), None)


def _not_a_value(name: str, kind: str, value: str) -> str:
    return f"{name} {value}: must be {({'int': 'a whole number', 'float': 'a number'}).get(kind, f'a {kind}')}"


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _same_on_all_ranks(message: str) -> UserError:
    """All ranks have the same command line, so rank 0 tells what is wrong with it."""
    if _is_main():
        return UserError(message)
    time.sleep(PATIENCE)  # a launcher would end rank 0 if this process ended first
    return EchoedError(message)
