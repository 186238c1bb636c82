"""Hosts that are folders of this machine: what stands in for ssh, and for torchrun."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
SSH = HERE / "stand_in_ssh.py"

# Starts its ranks as torchrun does, without the seconds that it takes to load.
TORCHRUN = """
import os, subprocess, sys
words = sys.argv[1 : sys.argv.index("--")]
options = dict(zip(words[::2], words[1::2]))
node, each = int(options.get("--node_rank", 0)), int(options["--nproc_per_node"])
def start(local):
    rank = {"RANK": str(node * each + local), "LOCAL_RANK": str(local), "TORCHELASTIC_RUN_ID": "none"}
    return subprocess.Popen([sys.executable, "-u", *sys.argv[sys.argv.index("--") + 1 :]], env={**os.environ, **rank})
ranks = [start(local) for local in range(each)]
sys.exit(int(any([rank.wait() for rank in ranks])))
"""


def install(folder: Path) -> dict[str, str]:
    """Put stand-ins into `folder`; returns the environment in which they are found."""
    folder.mkdir()
    program(folder / "ssh", SSH.read_text())
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(HERE.parents[1])}


def program(path: Path, source: str) -> None:
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)


def python_with_torchrun(folder: Path) -> Path:
    """An interpreter like this one, beside which another torchrun is found."""
    (folder / "bin").mkdir(parents=True)
    here = Path(sys.prefix)
    (folder / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    if (here / "pyvenv.cfg").exists():
        shutil.copy(here / "pyvenv.cfg", folder)
        for name in ("lib", "lib64"):
            if (here / name).exists():
                (folder / name).symlink_to(here / name)
    program(folder / "bin" / "torchrun", TORCHRUN)
    return folder / "bin" / "python"
