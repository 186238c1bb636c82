"""Stands in for ssh: the "hosts" are this machine. `ssh ... HOST LINE` runs the line, unless FOLDER/HOST.down exists.

It is copied to a folder in PATH as `ssh`; its folder is what FOLDER is.
"""

import os
import sys
from pathlib import Path

folder = Path(sys.argv[0]).parent
host, line = sys.argv[-2:]
with (folder / "commands").open("a") as log:
    log.write(" ".join(sys.argv[1:-1]) + "\n")
if (folder / f"{host}.down").exists():
    print(f"ssh: connect to host {host} port 22: No route to host", file=sys.stderr)
    sys.exit(255)
os.environ["STAND_IN_HOST"] = host
for name in ("NCCL_DEBUG", "SECRET_KEY"):  # what comes must come some other way
    os.environ.pop(name, None)
os.execv("/bin/sh", ["sh", "-c", line])
