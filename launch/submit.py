"""Start a program on the ranks of this machine or of many hosts, pass signals on, start it again after failures.

    python launch/submit.py --launcher torchrun --ranks 8 --max_restarts 5 -- launch/train.py --run_dir runs/sky ...
    python launch/submit.py --hostfile hosts --spares node9 --max_restarts 5 -- launch/train.py --run_dir runs/sky ...

Exit codes are those of the rank programs: 0 done or stopped by a signal, 1 failure, 2 a mistake in the command or a
host that cannot be used, 3 a rank that hangs, 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from ardiff import cli
from ardiff.errors import UserError
from ardiff.launching import allocation, carriers, devices, environment, hostfile, node, records, screening, slurm
from ardiff.launching.command import LAUNCHERS, Launch, attach, run_dir_of, split
from ardiff.launching.fleet import Fleet, NoHostsError, Settings
from ardiff.launching.job import StopRequest
from ardiff.launching.orphans import PATIENCE
from ardiff.launching.supervisor import InUseError, supervise

EXAMPLE = "python launch/submit.py --launcher torchrun --ranks 8 --max_restarts 5 -- launch/train.py --run_dir runs/sky"
HOST_MINUTES = Settings.rejoin_seconds / 60
_FOR_HOSTS = ("spares", "min_nodes", "preflight", "ssh_args", "carrier")  # they mean nothing on one machine
_FOR_NODES = ("ranks", "nodes", "node_rank", "carried")  # and these nothing with a hostfile, which says it


def main() -> int:
    """The program."""
    own, command = split(sys.argv[1:])
    if not command and not {"-h", "--help"} & set(own):
        raise UserError(_nothing_to_start(own))
    parser = _parser()
    options = parser.parse_args(attach(own, "--ssh_args", "--slurm_args"))
    if command[0].startswith("-") and command[0] != "-m":
        raise UserError(f"{command[0]}: the first word behind -- is the program, as in {EXAMPLE}")
    _check(options, command)
    if options.slurm:
        return slurm.run(options, command, cli.say)
    given = environment.collect(os.environ, options.pass_env, options.env_file)
    if options.carrier == "srun":
        return _in_allocation(options, tuple(command), given)
    if options.hostfile is not None:
        return _on_hosts(options, tuple(command), given)
    return _on_this_node(options, tuple(command), given)


def _on_this_node(options: argparse.Namespace, command: tuple[str, ...], given: environment.Variables) -> int:
    """This machine's ranks: all of them, or one node's share."""
    stop = StopRequest()
    if options.carried:
        node.receive(options.carried, stop)
    os.environ.update(given.values)
    launch = Launch(
        options.launcher,
        _ranks(options),
        command,
        nodes=options.nodes or 1,
        node_rank=options.node_rank or 0,
        master_addr=options.master_addr,
        master_port=options.master_port,
    )
    share = node.Node(launch, bool(options.carried))
    if options.dry_run:
        for line in environment.collect({}, [], options.env_file).shown():
            print(f"export {line}")
        print(launch.describe())
        return cli.EXIT_OK
    if not options.carried:
        what = f"run_dir {launch.run_dir}" if launch.run_dir else command[command[0] == "-m"]
        of = f", node {launch.node_rank} of {launch.nodes}" if launch.nodes > 1 else ""
        _tell(f"{launch.ranks_by_node[launch.node_rank]} rank(s) with {options.launcher}{of}, {what}")
    code = supervise(share, options.max_restarts, 60 * options.stop_minutes, _tell, stop)
    # Higher ones are those of a carrier that has lost its host.
    return cli.EXIT_FAILURE if options.carried and code > cli.EXIT_INTERRUPTED else code


def _on_hosts(options: argparse.Namespace, command: tuple[str, ...], given: environment.Variables) -> int:
    """The ranks of all hosts of a hostfile."""
    hosts = hostfile.read(options.hostfile)
    spares = hostfile.read_spares(options.spares, hosts) if options.spares else []
    carrier = carriers.carrier(options.carrier or carriers.CARRIERS[0], options.ssh_args or "", options.dry_run)
    with StopRequest() as stop:
        return _on_fleet(options, command, given, hosts, spares, carrier, stop)


def _in_allocation(options: argparse.Namespace, command: tuple[str, ...], given: environment.Variables) -> int:
    """The ranks of all nodes of the SLURM job that this is in."""
    with StopRequest() as stop:
        try:
            here = allocation.Allocation.here(stop)
        except allocation.NoAnswerError as error:
            cli.complain(error)
            return cli.EXIT_FAILURE
        hosts = here.with_ranks(_ranks(options))
        again = f", start {here.restarts + 1}" if here.restarts else ""
        if not options.dry_run:
            _tell(f"SLURM job {here.job}{again}")
        run_dir = run_dir_of(command)
        exit_file = records.ExitFile(run_dir) if run_dir else None
        try:
            carrier = here.carrier(60 * options.stop_minutes, stop)
            code = _on_fleet(options, command, given, hosts, [], carrier, stop, here.restarts > 0)
        except (NoHostsError, allocation.NoAnswerError, InUseError) as error:
            if isinstance(error, InUseError) and not here.restarts:
                raise
            cli.complain(error)
            code = cli.EXIT_FAILURE  # what SLURM gave, or ranks of the last stay, is no mistake of the user's
        if exit_file is None or options.dry_run:
            return code
        assert run_dir is not None
        return here.conclude(code, stop, exit_file.read(), run_dir, options.max_requeues, _tell)


def _on_fleet(
    options: argparse.Namespace,
    command: tuple[str, ...],
    given: environment.Variables,
    hosts: list[hostfile.Host],
    spares: list[hostfile.Host],
    carrier: carriers.Carrier,
    stop: StopRequest,
    requeued: bool = False,
) -> int:
    """The ranks of these hosts."""
    settings = Settings(
        options.launcher,
        command,
        given,
        stop_seconds=60 * options.stop_minutes,
        fail_seconds=60 * options.fail_minutes,
        # SLURM replaces a node.
        rejoin_seconds=0 if carrier.name == "srun" else 60 * (options.host_minutes or HOST_MINUTES),
        min_nodes=options.min_nodes,
        master_addr=options.master_addr,
        master_port=options.master_port,
    )
    fleet = Fleet(hosts, spares, carrier, settings)
    if options.dry_run:
        if options.preflight:
            print(f"preflight, before the job:\n  {screening.describe(command, hosts)}")
        print(fleet.describe())
        return cli.EXIT_OK
    if options.preflight:
        code = screening.screen(fleet, hosts, spares, carrier, settings, stop, _tell)
        if code != cli.EXIT_OK:
            return code
    return supervise(fleet, options.max_restarts, settings.stop_seconds, _tell, stop, requeued)


def _parser() -> cli.Parser:
    parser = cli.parser(
        "Start a program on the ranks of this machine or of many hosts; the program and its options come behind --.",
        EXAMPLE,
    )
    add = parser.add_argument
    add("--launcher", choices=LAUNCHERS, default="torchrun", help="default: torchrun")
    add("--ranks", metavar="N[,N...]", help="processes of each node (default: one for every GPU; 1 without any)")
    add("--max_restarts", type=int, default=0, help="start again so often after failures and hangs (default 0)")
    add(
        "--stop_minutes",
        type=float,
        default=PATIENCE / 60,
        help=f"time for the last step and checkpoint after a signal, before all is killed (default {PATIENCE / 60:g})",
    )
    add("--env_file", type=Path, metavar="FILE", help="more variables for the ranks, secrets too: lines NAME=value")
    add("--dry_run", action="store_true", help="print commands, files and variables, and do nothing")
    hosts = parser.add_argument_group("many hosts, from one of them or another machine").add_argument
    hosts("--hostfile", type=Path, metavar="FILE", help="lines 'name slots=N', N ranks on that host")
    hosts("--carrier", choices=carriers.CARRIERS, help="what reaches the hosts (default ssh)")
    hosts("--ssh_args", metavar="WORDS", help="more options for ssh, as in --ssh_args='-p 2222 -i KEY'")
    hosts("--spares", metavar="HOSTS", help="names separated by commas, or a hostfile: they replace hosts that fail")
    hosts("--min_nodes", type=int, metavar="N", help="go on with so few hosts when others fail (default: all of them)")
    hosts("--preflight", action="store_true", help="run launch/preflight.py first, and drop the hosts that it names")
    hosts("--pass_env", action="append", default=[], metavar="NAME", help="a variable of this shell for the ranks")
    hosts(
        "--fail_minutes",
        type=float,
        default=Settings.fail_seconds / 60,
        help=f"time for the others to end once a host has failed (default {Settings.fail_seconds / 60:g})",
    )
    hosts(
        "--host_minutes",
        type=float,
        help=f"time for a lost host to come back before a restart, where there is no spare (default {HOST_MINUTES:g})",
    )
    nodes = parser.add_argument_group("one node's share of a job, started on every node (without ssh)").add_argument
    nodes("--nodes", type=int, metavar="N", help="how many there are (default 1)")
    nodes("--node_rank", type=int, metavar="K", help="this one's number, from 0")
    nodes("--master_addr", metavar="HOST", help="the first node's address (with --hostfile: found out)")
    nodes("--master_port", type=int, metavar="PORT", help="a free port there (with --hostfile: found out)")
    nodes("--carried", metavar="SOURCE", help=argparse.SUPPRESS)  # by a carrier: where the variables are
    slurm.add_options(parser)
    return parser


def _check(options: argparse.Namespace, command: list[str]) -> None:
    slurm.check(options)
    if options.max_restarts < 0:
        raise UserError(f"--max_restarts {options.max_restarts}: must be at least 0")
    for name in ("stop_minutes", "fail_minutes", "host_minutes"):
        minutes = getattr(options, name)
        if minutes is not None and not 0 < minutes < float("inf"):
            raise UserError(f"--{name} {minutes:g}: must be greater than 0 and finite")
    if options.max_restarts and run_dir_of(command) is None:
        raise UserError(f"--max_restarts: {command[0]} keeps no run that a restart could go on with; leave it out")
    if options.slurm:
        return
    on_hosts = options.hostfile is not None
    if options.carrier == "srun":
        for name in slurm.NOT_INSIDE:
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: cannot be given with --carrier srun, where SLURM chose the nodes")
        return
    for name in _FOR_NODES if on_hosts else _FOR_HOSTS:
        given = getattr(options, name)
        if given is not None and given is not False:  # 0 is a value too
            why = (
                "cannot be given with --hostfile, which names the nodes and their ranks"
                if on_hosts
                else "needs --hostfile FILE"
            )
            raise UserError(f"--{name}: {why}")


def _ranks(options: argparse.Namespace) -> tuple[int, ...]:
    if options.ranks is None:
        return (1 if options.launcher == "python" else devices.gpus() or 1,)
    try:
        return tuple(int(word) for word in options.ranks.split(","))
    except ValueError:
        raise UserError(f"--ranks {options.ranks}: must be a whole number, or one for each node as in 8,8,4") from None


def _nothing_to_start(own: list[str]) -> str:
    at = next((index for index, word in enumerate(own) if word.endswith(".py") or word == "-m"), None)
    if at is None:
        return f"nothing to start: put the program behind --, as in {EXAMPLE}"
    before, program = " ".join(own[:at]), " ".join(own[at : at + 2])
    return f"nothing to start: put the program behind --, as in submit.py {before}{' ' * bool(before)}-- {program} ..."


def _tell(line: str) -> None:
    cli.say(f"{time.strftime('%H:%M:%S')} submit: {line}")


if __name__ == "__main__":
    cli.run(main)
