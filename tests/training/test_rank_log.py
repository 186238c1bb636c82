"""Log files of ranks, in processes of their own where they touch the interpreter's hooks."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ardiff.training import rank_log
from ardiff.training.rank_log import open_rank_log

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, sys, threading
from pathlib import Path
from ardiff.training.rank_log import open_rank_log
log = logging.getLogger("ardiff")
log.addHandler(logging.StreamHandler(sys.stdout))
log.setLevel(logging.ERROR)
log.propagate = False
open_rank_log(Path(sys.argv[1]), 3, 4)
log.info("quiet on the console")
log.error("loud on the console")
thread = threading.Thread(target=lambda: 1 / 0, name="loader")
thread.start()
thread.join()
raise KeyError("lost")
"""


@pytest.fixture
def logger():
    """The logger of the package, as programs set it up on ranks other than 0."""
    log = logging.getLogger("ardiff")
    before = log.level, log.handlers, log.propagate
    log.level, log.handlers, log.propagate = logging.ERROR, [], False
    yield log
    for handler in [handler for handler in log.handlers if isinstance(handler, rank_log.RankLog)]:
        handler.close()
    log.level, log.handlers, log.propagate = before


def test_everything_goes_into_the_file_and_the_console_stays(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stdout == "loud on the console\n"
    assert "ZeroDivisionError" in result.stderr and "KeyError: 'lost'" in result.stderr  # the usual hooks still act
    text = (tmp_path / "logs" / "rank00003.log").read_text()
    first = text.partition("\n")[0]
    assert "rank 3 INFO ==== start: rank 3 of 4 on " in first and "python -c" in first
    assert "rank 3 INFO quiet on the console" in text and "rank 3 ERROR loud on the console" in text
    assert "uncaught in thread loader:\nTraceback" in text and "ZeroDivisionError" in text
    assert text.rstrip().endswith("KeyError: 'lost'")


def test_a_restart_appends_after_a_half_line(tmp_path, logger):
    open_rank_log(tmp_path, 0, 1).close()
    path = tmp_path / "logs" / "rank00000.log"
    with path.open("a") as file:
        file.write("killed within a li")
    handler = open_rank_log(tmp_path, 0, 1)
    logger.info("going on")
    assert path.read_text().count("==== start") == 2  # no buffer in between
    lines = path.read_text().splitlines()
    assert "killed within a li" in lines and lines[-1].endswith("INFO going on")
    hook = sys.excepthook
    handler.close()
    assert handler not in logger.handlers and logger.level == logging.ERROR and sys.excepthook != hook


def test_a_full_disk_loses_lines_and_is_told_once(tmp_path, logger, monkeypatch, capfd):
    handler = open_rank_log(tmp_path, 0, 1)
    with Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(handler, "_file", full.fileno())
        logger.info("lost")
        logger.info("lost as well")
        monkeypatch.undo()
    logger.info("kept")
    assert capfd.readouterr().err.count("No space left on device") == 1
    text = handler.path.read_text()
    assert "lost" not in text and text.endswith("INFO kept\n")


def test_a_folder_that_cannot_be_made_is_no_reason_to_end(tmp_path, logger, caplog):
    (tmp_path / "logs").write_text("in the way")
    logger.addHandler(caplog.handler)
    assert open_rank_log(tmp_path, 0, 1) is None
    assert "this rank has no log file" in caplog.text
    logger.removeHandler(caplog.handler)
    assert rank_log.log is logger and logger.level == logging.ERROR
