"""What carries commands to hosts: command lines, quoting, exit codes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stand_ins

from ardiff.errors import UserError
from ardiff.launching import carriers
from ardiff.launching.carriers import Pdsh, Ssh, shell_line

needs_pdsh = pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")


def test_command_lines():
    kept = "-o BatchMode=yes -o ConnectTimeout=10 -o ControlPath=none"
    kept += " -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
    assert " ".join(Ssh(("-p", "2222")).command("node1", "LINE")) == f"ssh -p 2222 -T {kept} node1 LINE"
    assert Pdsh().command("node1", "a %h")[:7] == ["pdsh", "-R", "ssh", "-S", "-N", "-w", "node1"]
    assert Pdsh(("-p", "2222")).environment() == {"PDSH_SSH_ARGS_APPEND": f"-p 2222 {kept}"}


def test_pdsh_parts_options_at_spaces():
    assert carriers.carrier("pdsh", "-o 'Port=2222'", for_show=True).arguments == ("-o", "Port=2222")
    with pytest.raises(UserError, match=r"pdsh cannot pass 'ProxyCommand=nc a b' on; put it into ~/\.ssh/config"):
        carriers.carrier("pdsh", "-o 'ProxyCommand=nc a b'", for_show=True)
    assert carriers.carrier("ssh", "-o 'ProxyCommand=nc a b'", for_show=True).arguments[1] == "ProxyCommand=nc a b"


def test_words_and_folders_are_quoted():
    line = shell_line(Path("/a b"), ["python", "x'y", "$HOME", "*"], {"A": "1 2"})
    assert line == "cd '/a b' && exec env 'A=1 2' python 'x'\"'\"'y' '$HOME' '*'"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")
def test_ssh_knows_every_option_and_takes_the_users_first():
    command = Ssh(("-o", "ConnectTimeout=3")).command("nowhere.invalid", "true")
    shown = subprocess.run([command[0], "-G", "-F", "none", *command[1:-1]], capture_output=True, text=True, check=True)
    settings = dict(line.split(" ", 1) for line in shown.stdout.splitlines() if " " in line)
    assert settings["batchmode"] == "yes" and settings["connecttimeout"] == "3"
    assert settings["serveraliveinterval"] == "10" and settings["serveralivecountmax"] == "3"


@needs_pdsh
def test_pdsh_knows_every_option():
    words = [word for word in Pdsh().command("node1", "LINE") if word.startswith("-")]
    shown = subprocess.run(["pdsh", "-h"], capture_output=True, text=True, check=False)
    known = {line.split()[0] for line in (shown.stdout + shown.stderr).splitlines() if line.startswith("-")}
    assert set(words) <= known


@pytest.mark.parametrize("carrier", [Ssh(), pytest.param(Pdsh(), marks=needs_pdsh)], ids=["ssh", "pdsh"])
def test_a_line_arrives_as_it_is_and_its_exit_code_comes_back(tmp_path, carrier):
    variables = {**stand_ins.install(tmp_path / "bin"), **carrier.environment()}

    def run(line):
        return subprocess.run(
            carrier.command("alpha", line), env=variables, capture_output=True, text=True, check=False
        )

    words = ["100%", "%h %n %u %%", "a  b", "it's", '"$HOME"', "back\\slash", "*", "ü"]
    line = shell_line(tmp_path, [sys.executable, "-c", "import os, sys; print(os.getcwd(), sys.argv[1:])", *words], {})
    assert run(line).stdout.splitlines() == [f"{tmp_path} {words}"]
    result = run("echo bad >&2; exit 3")
    assert result.returncode == 3 and "bad" in result.stderr and not carrier.lost(3)
    (tmp_path / "bin" / "alpha.down").touch()
    result = run("true")
    assert carrier.lost(result.returncode) and "No route to host" in result.stderr
    assert "-o BatchMode=yes" in (tmp_path / "bin" / "commands").read_text()


def test_a_carrier_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--carrier pdsh: .* is not in PATH"):
        carriers.carrier("pdsh", "")
    assert carriers.carrier("pdsh", "", for_show=True).name == "pdsh"
    with pytest.raises(UserError, match="--ssh_args '-p: No closing quotation"):
        monkeypatch.setenv("PATH", os.defpath)
        carriers.carrier("ssh", "'-p", for_show=True)
