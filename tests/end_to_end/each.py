"""Run commands one after the other, each in a fork of a process that has imported everything heavy once.

    python -m tests.end_to_end.each COMMANDS.json RESULTS.json

COMMANDS: a list of [PROGRAM, OPTION, ...]. RESULTS: for each its exit code and what it printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

from tests.end_to_end import ranks  # noqa: F401  # what the programs import


def main() -> None:
    """Of the process that forks, and of each fork."""
    commands, results = (Path(word) for word in sys.argv[1:])
    found = []
    for path, *options in json.loads(commands.read_text()):
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.argv = [path, *options]
                sys.path[0] = str(Path(path).resolve().parent)
                runpy.run_path(path, run_name="__main__")
                sys.exit()
            status = os.waitpid(child, 0)[1]
            output.seek(0)
            found.append((os.waitstatus_to_exitcode(status), output.read().decode()))
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
