"""What programs say when nobody can hear it: the exit code is right all the same."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from ardiff import cli
from ardiff.errors import UserError

def main():
    for number in range(3):
        cli.say(f"line {number}")
    if sys.argv[1] == "mistake":
        raise UserError("no such thing")
    if sys.argv[1] == "interrupt":
        raise KeyboardInterrupt
    if sys.argv[1] == "closes":
        sys.stderr.close()
        raise UserError("no such thing")
    return 0

cli.run(main)
"""


@pytest.mark.parametrize(
    ("what", "redirected", "code"),
    [
        ("mistake", "", 2),
        ("mistake", "2>&-", 2),  # closed before the program begins
        ("mistake", "2>/dev/full", 2),  # the disk of a log is full
        ("mistake", ">&- 2>&-", 2),
        ("closes", "", 2),
        ("interrupt", "2>&-", 130),
        ("interrupt", "2>/dev/full", 130),
        ("fine", ">/dev/full", 0),
        ("fine", ">&-", 0),
    ],
)
def test_a_stream_that_takes_nothing_does_not_change_the_exit_code(what, redirected, code):
    command = f'exec "$0" -c "$1" {what} {redirected}'
    result = subprocess.run(
        ["sh", "-c", command, sys.executable, PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert result.stderr == ("error: no such thing\n" if (what, redirected) == ("mistake", "") else "")
    assert result.stdout == (
        "" if ">&-" in redirected.split() or ">/dev/full" in redirected.split() else "line 0\nline 1\nline 2\n"
    )


def test_a_reader_that_has_gone_is_no_failure():
    program = "import sys, time; from ardiff import cli; sys.stdin.read(1); "
    program += "cli.run(lambda: [print(i, flush=True) for i in range(9)] and 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0
    process.stderr.close()
