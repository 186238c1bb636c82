"""What a task of srun makes of SLURM's variables."""

import os

import pytest

from ardiff.errors import UserError
from ardiff.launching import slurm_step
from ardiff.training.distributed import launcher_environment

# As SLURM 22.05 sets them for the last of 2 x 2 tasks.
STEP = {
    **{"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"},
    **{"SLURM_JOB_NODELIST": "node[1-9]", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
}
OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[007-012,020],login", "gpu007"),
        ("a[3,5-7]x", "a3x"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("login,gpu[1-2]", "login"),
        ("c-01.site.org,c-02.site.org", "c-01.site.org"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert slurm_step.first_host(nodes) == first


def test_tasks_of_every_node():
    assert slurm_step.tasks_per_node("4") == [4]
    assert slurm_step.tasks_per_node("8(x3)") == [8, 8, 8]
    assert slurm_step.tasks_per_node("8(x2),4,1(x2)") == [8, 8, 4, 1, 1]


def test_ports_are_below_the_ephemeral_ones_and_differ_by_job_and_step():
    ports = {slurm_step.port(str(job), str(step)) for job in range(1000, 1100) for step in range(10)}
    assert len(ports) == 1000 and min(ports) >= 10000 and max(ports) < 30000
    assert slurm_step.port("12_3", "4294967291") in slurm_step.PORTS


def test_a_task_learns_its_rank_and_where_rank_0_is():
    found = slurm_step.rank_variables(STEP)
    assert found is not None
    port = found.pop("MASTER_PORT")
    assert found == {
        **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node3"},
    }
    others = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert slurm_step.rank_variables(others)["MASTER_PORT"] == port
    given = {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    assert slurm_step.rank_variables(given).items() >= {("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "5")}


def test_a_single_task_is_alone():
    assert slurm_step.rank_variables({}) is None
    assert slurm_step.rank_variables({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None  # an interactive shell
    assert slurm_step.rank_variables({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None  # the shell of salloc


def test_a_batch_script_without_srun_is_told(monkeypatch):
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start the program with srun"):
        launcher_environment()


def test_the_rank_program_takes_them(monkeypatch):
    for name in OWN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    launcher_environment()
    assert (os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("3", "2", "node3")
