"""Choosing hosts: what is wrong with them, who takes their place, and when a job goes on with fewer."""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stand_ins

from ardiff.errors import UserError
from ardiff.launching import checks, fleet, hostcheck, node, screening
from ardiff.launching.allocation import Srun
from ardiff.launching.carriers import Pdsh, Ssh
from ardiff.launching.environment import Variables
from ardiff.launching.fleet import Fleet, Settings
from ardiff.launching.hostfile import Host
from ardiff.launching.job import StopRequest
from ardiff.launching.supervisor import NotStartedError

FAKE = str(Path(__file__).with_name("fake_rank.py"))
HOSTS = [Host("alpha", 2), Host("beta", 2)]


@pytest.fixture
def bin_(tmp_path, monkeypatch) -> Path:
    for name, value in stand_ins.install(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "bin"


def settings(tmp_path: Path, **more) -> Settings:
    command = (FAKE, "--run_dir", str(tmp_path / "run"), "--plan", "finish")
    return replace(Settings("torchrun", command, Variables(), 10.0, master_addr="127.0.0.1"), **more)


def prepared(job: Fleet, again: bool = False) -> tuple[list[str], list[str]]:
    """The names of its hosts, and what was told."""
    told: list[str] = []
    with StopRequest() as stop:
        assert job.prepare(again, stop, told.append)
    return [host.name for host in job.hosts], told


def test_all_hosts_are_taken_in_their_order(tmp_path, bin_):
    job = Fleet(HOSTS, [Host("gamma", 2)], Ssh(), settings(tmp_path))
    assert prepared(job)[0] == ["alpha", "beta"] and [host.name for host in job.spares] == ["gamma"]


def test_the_first_host_can_be_replaced_and_comes_back_as_a_spare(tmp_path, bin_):
    (bin_ / "alpha.down").touch()
    job = Fleet(HOSTS, [Host("gamma", 4)], Ssh(), settings(tmp_path))
    names, told = prepared(job)
    assert names == ["gamma", "beta"] and "; gamma takes its place" in told[0]
    assert job.hosts[0].slots == 2 and [host.name for host in job.spares] == ["alpha"]
    (bin_ / "gamma.down").touch()
    (bin_ / "alpha.down").unlink()
    assert prepared(job, again=True)[0] == ["alpha", "beta"]


def test_fewer_hosts_are_taken_only_when_allowed(tmp_path, bin_):
    (bin_ / "beta.down").touch()
    with pytest.raises(UserError, match=r"1 of 2 hosts cannot be used: .*\n  beta: cannot be reached"):
        prepared(Fleet(HOSTS, [], Ssh(), settings(tmp_path)))
    names, told = prepared(Fleet(HOSTS, [], Ssh(), settings(tmp_path, min_nodes=1)))
    assert names == ["alpha"] and told[0] == "going on with 1 of 2 hosts, as --min_nodes allows:"
    with pytest.raises(UserError, match="--min_nodes 3: must be from 1 to 2"):
        Fleet(HOSTS, [], Ssh(), settings(tmp_path, min_nodes=3))


def test_a_lost_host_is_waited_for_before_a_restart(tmp_path, bin_, monkeypatch):
    job = Fleet(HOSTS, [], Ssh(), settings(tmp_path, rejoin_seconds=60.0))
    (bin_ / "beta.down").touch()
    monkeypatch.setattr(StopRequest, "sleep", lambda *_: (bin_ / "beta.down").unlink())
    names, told = prepared(job, again=True)
    assert names == ["alpha", "beta"] and len(told) == 1 and told[0].endswith("No route to host); waiting for it")
    (bin_ / "beta.down").touch()
    job = Fleet(HOSTS, [], Ssh(), settings(tmp_path, rejoin_seconds=0.0))
    with pytest.raises(NotStartedError, match="not started again: 1 of 2 hosts cannot be used; the same command"):
        prepared(job, again=True)


def test_hosts_that_do_not_reach_the_first_one_are_named(tmp_path, bin_):
    with pytest.raises(UserError, match=r"beta: does not reach alpha at port .* give --master_addr, or open"):
        job = Fleet(HOSTS, [], Ssh(), settings(tmp_path, master_addr="name.invalid"))
        job._asking.meeting = 0.5
        prepared(job)
    with pytest.raises(UserError, match=r"alpha: port 1: .*; is --master_port taken"):
        job = Fleet(HOSTS, [], Ssh(), settings(tmp_path))
        job._asking.meet = lambda *_: ("", {"alpha": "alpha: port 1: in use; is --master_port taken?"})
        prepared(job)


GOOD = {
    **{"host": "a", "python": "3.11", "packages": {"torch": "2.13.0"}, "source": "1", "commit": "abc", "gpus": 8},
    **{"shared": True, "folder": True, "port": 1, "resolves_to": ["10.0.0.1"], "address": ""},
    **{"interfaces": {"eth0": "10.0.0.1"}},
}


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({}, None),
        ({"python": "3.12"}, "n: Python 3.12, here 3.11"),
        ({"packages": {"torch": None}}, "n: has torch missing; here torch 2.13.0"),
        ({"source": "2", "commit": "def"}, "holds other program files than here (commit def there, abc here); make"),
        ({"source": "2"}, "holds other program files than here (changed since the commit)"),
        ({"shared": False}, "n: does not see this host's /data; --run_dir has to be on storage that all hosts share"),
        ({"folder": False}, f"n: has no folder {Path.cwd()}, where this is started"),
        ({"gpus": 4}, "n: slots=8, but it has 4 GPU(s)"),
    ],
)
def test_what_has_to_be_equal(facts, complaint):
    answer = checks._judged(Host("n", 8), checks.Answer({**GOOD, **facts}), GOOD, Path("/data"), some_gpus=True)
    assert (answer.problem or "").count("\n") == 0 and (complaint or "") in (answer.problem or "")
    assert (answer.problem is None) == (complaint is None)


def test_what_may_keep_ranks_apart_is_warned_of():
    hosts, other = [Host("a", 1), Host("b", 1)], {**GOOD, "host": "b"}
    facts = {"a": GOOD, "b": {**other, "resolves_to": ["127.0.1.1"]}}
    (warning,) = checks.warnings(hosts, facts, {})
    assert warning.startswith("warning: b: its own name b resolves to 127.0.1.1") and "GLOO_SOCKET_IFNAME" in warning
    assert checks.warnings(hosts, facts, {"GLOO_SOCKET_IFNAME": "eth0"}) == []
    assert checks.warnings(hosts[1:], facts, {}) == []
    (warning,) = checks.warnings(hosts, {"a": GOOD, "b": GOOD}, {})
    assert warning == "warning: a, b are the same machine; their ranks share its GPUs and cores"
    facts = {"a": {**GOOD, "interfaces": {"eth0": "10.0.0.1", "ib0": "10.1.0.1"}}, "b": other}
    (warning,) = checks.warnings(hosts, facts, {})
    assert "a has several networks (eth0 10.0.0.1, ib0 10.1.0.1)" in warning
    assert checks.addresses_of(hosts[0], {**facts["a"], "address": "10.1.0.1"}) == ["a", "10.1.0.1", "10.0.0.1"]
    assert checks.addresses_of(Host("u@127.0.0.1", 1), {**GOOD, "interfaces": {}}) == ["a"]


def test_a_folder_is_shared_where_the_same_file_is_seen(tmp_path):
    with checks.token(tmp_path) as (folder, secret):
        assert folder.stat().st_mode & 0o077 == 0 and hostcheck._sees(folder / hostcheck.TOKEN, secret)
        (folder / hostcheck.TOKEN).write_text("another")
        hostcheck.TOKEN_PATIENCE, before = 0.0, hostcheck.TOKEN_PATIENCE
        try:
            assert not hostcheck._sees(folder / hostcheck.TOKEN, secret)
        finally:
            hostcheck.TOKEN_PATIENCE = before
    assert list(tmp_path.iterdir()) == []
    assert checks.shared_folder(tmp_path / "a" / "b") == tmp_path and checks.shared_folder(None) is None
    (tmp_path / "run").mkdir()
    assert checks.shared_folder(tmp_path / "run") == tmp_path
    (tmp_path / "run" / "config.yaml").touch()
    assert checks.shared_folder(tmp_path / "run") == tmp_path / "run"


def test_without_standard_input_variables_are_in_a_private_file(tmp_path):
    own = settings(tmp_path, variables=Variables({"KEY": "abc"}, frozenset({"KEY"})))
    job = Fleet(HOSTS, [], Pdsh(), own)
    source, first = job._deliver("job", 1)
    assert first == b"" and Path(source).stat().st_mode & 0o777 == 0o600 and Path(source).parent.parent == tmp_path
    assert json.loads(Path(source).read_text()) == {
        **{"variables": {"KEY": "abc"}, "beats": False, "lost_seconds": 120.0},
    }
    assert "KEY=***" in job.describe() and "abc" not in job.describe()
    job.close()
    assert list(tmp_path.iterdir()) == []


def test_no_file_with_variables_is_left_by_another_start(tmp_path, monkeypatch):
    """And all are there before the first host runs, which removes a folder that it finds empty."""
    job, seen = Fleet(HOSTS, [], Pdsh(), settings(tmp_path)), []
    monkeypatch.setattr(fleet, "Share", lambda *_: seen.append(sorted(tmp_path.glob(".ardiff-*/*.json"))))
    job._meeting = ("127.0.0.1", 1)
    job.start(lambda _: None)
    job.start(lambda _: None)
    assert [[file.name for file in files] for files in seen] == [["0.json", "1.json"]] * 4
    assert seen[0] == seen[1] and seen[2] == seen[3] and seen[0] != seen[2]
    job.close()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_lost_host_is_waited_for_longer_than_its_ranks_live(tmp_path):
    job = Fleet(HOSTS, [], Ssh(), settings(tmp_path, fail_seconds=300.0))
    sent = json.loads(job._deliver("job", 0)[1])
    assert sent["lost_seconds"] == 300.0 and job.lock_patience > node.SILENCE + sent["lost_seconds"]


@pytest.mark.parametrize(("carrier", "remedy"), [(Ssh(), "out of the hostfile"), (Srun(), "have SLURM leave them out")])
def test_the_remedy_is_one_that_the_carrier_has(tmp_path, carrier, remedy):
    choice = checks.Choice(HOSTS[:1], {}, [], ["beta: cannot be reached"], HOSTS[1:], [])
    refusal = str(Fleet(HOSTS, [], carrier, settings(tmp_path))._refusal(choice, False))
    assert refusal.startswith("1 of 2 hosts cannot be used: mend them, ") and remedy in refusal
    assert ("hostfile" in refusal) == (carrier.name != "srun")


@pytest.mark.parametrize(("numbers", "code"), [([signal.SIGUSR1], 0), ([signal.SIGINT] * 2, 130)])
def test_a_signal_ahead_of_preflight_is_a_stop(tmp_path, bin_, numbers, code):
    own = settings(tmp_path, command=(str(tmp_path / "train.py"), "--run_dir", str(tmp_path / "run")))
    (tmp_path / "train.py").touch()
    with StopRequest() as stop:
        for number in numbers:
            signal.raise_signal(number)
        told: list[str] = []
        assert screening.screen(Fleet(HOSTS, [], Ssh(), own), HOSTS, [], Ssh(), own, stop, told.append) == code
    assert told == ["preflight on 2 host(s)"]


# Preflight's report as if of two hosts with two ranks each and a spare; the second one is bad.
PREFLIGHT = """
import json, os, sys
if os.environ["RANK"] == "0":
    good = [k != BAD for k in range(3)]
    hosts = [{"ranks": [2 * k, 2 * k + 1], "ok": good[k], "failures": ["slow"][good[k] :]} for k in range(3)]
    report = {"version": 1, "ok": BAD is None and not GENERAL, "hosts": hosts, "failures": GENERAL}
    open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(report))
sys.exit(int(BAD is not None))
"""


@pytest.mark.parametrize(
    ("bad", "general", "spares", "code", "names"),
    [
        ("1", "[]", ["gamma"], 0, ["alpha", "gamma"]),
        ("None", "['the batch does not divide']", ["gamma"], 1, None),
        ("1", "[]", [], 1, None),
        ("1 if FIRST else None", "['collectives: hang'] if FIRST else []", ["gamma"], 0, ["alpha", "gamma"]),
    ],
)
def test_hosts_that_fail_preflight_are_replaced(tmp_path, bin_, monkeypatch, bad, general, spares, code, names):
    monkeypatch.setattr(sys, "executable", str(stand_ins.python_with_torchrun(tmp_path / "venv")))
    program = tmp_path / "preflight.py"
    first = f"import os; from pathlib import Path; SEEN = Path({str(tmp_path / 'seen')!r})\nFIRST = not SEEN.exists()\n"
    first += "if os.environ['RANK'] == '0': SEEN.touch()\n"  # it alone writes the report
    program.write_text(f"{first}BAD, GENERAL = {bad}, {general}\n{PREFLIGHT}")
    monkeypatch.setattr(screening, "PREFLIGHT", str(program))
    (tmp_path / "train.py").touch()
    own = settings(tmp_path, command=(str(tmp_path / "train.py"), "--run_dir", str(tmp_path / "run")))
    others = [Host(name, 2) for name in spares]
    job, told = Fleet(HOSTS, others, Ssh(), own), []
    if not spares:
        program.write_text(program.read_text().replace("range(3)", "range(2)"))
    with StopRequest() as stop:
        assert screening.screen(job, HOSTS, others, Ssh(), own, stop, told.append) == code, told
    if bad.startswith("1"):
        assert "preflight: beta: slow" in told
    assert told.count("preflight on 2 host(s)") == ("FIRST" in bad) + (not spares)
    if names:
        assert prepared(job)[0] == names
    else:
        assert told[-1].startswith("preflight failed") and told[-1].endswith("nothing is started (exit code 1)")
    assert list(tmp_path.glob(".ardiff*")) == []


def test_preflight_gets_the_settings_of_the_program():
    command = ("launch/train_vae.py", "--config", "tiny", "--resume", "none", "--run_dir=R", "--train.seed", "1")
    own = ["--config", "tiny", "--run_dir=R", "--train.seed", "1", "--program", "train_vae", "--world_size", "4"]
    assert list(screening.words(command, 4, "F"))[1:] == [*own, "--json", "F"]
    with pytest.raises(UserError, match=r"--preflight: checks what launch/train.py and train_vae.py need"):
        screening.words(("launch/sample.py",), 4, "F")
