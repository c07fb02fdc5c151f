"""A real Slurm on one machine: one controller, several node daemons, GPUs that are dummy device files.

    python -m tests.slurm.local_cluster FOLDER        # until Ctrl-C; prints the SLURM_CONF to use

It needs root, the packages slurmctld, slurmd, slurm-client and munge, and touches nothing of an installed Slurm: its
configuration, state and logs lie in a folder of its own, found through the environment variable SLURM_CONF.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

HOSTS = Path("/etc/hosts")
COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged", "munge")
NODES, GPUS = 2, 4
GRACE_S, KILL_WAIT_S, CREDENTIAL_S, NODE_TIMEOUT_S = 15, 5, 5, 5
"""Preemption grace, TERM to KILL, wait before a requeued job starts, silence after which a node counts as lost."""

_CONFIGURATION = """\
ClusterName=megadiff
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire={credential_s}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout={node_timeout_s}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=nograce Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [command for command in COMMANDS if shutil.which(command, path=_path()) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)}); apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a Slurm of several nodes on one machine can only be started by root"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} cannot be written, so the nodes' names cannot be resolved"
    return None


class LocalCluster:
    """The running daemons; make it with `local_cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        # Of this process alone: names go into the machine's list of hosts, and two test runs may share a machine.
        self.prefix = f"megadiff-{os.getpid()}-node"
        self.nodes = [f"{self.prefix}{n}" for n in range(1, NODES + 1)]
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.configuration)}

    def call(self, *command: str, check: bool = True) -> str:
        """What a Slurm client command prints.

        Raises:
            AssertionError: it failed, and `check` is set; the message has its stderr.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def start_node(self, node: str) -> None:
        """Start one node daemon; it registers by itself."""
        self._daemon("slurmd", "-f", str(self.configuration), "-N", node)

    def lose_node(self, node: str) -> None:
        """KILL the node's daemon, its step managers and all below them, as a power cut would."""
        daemon = psutil.Process(int((self.folder / f"{node}.pid").read_text()))
        managers = list(self._step_managers(node))
        doomed = [daemon, *managers, *(child for p in managers for child in p.children(recursive=True))]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when all nodes are idle."""
        self._configure()
        _start_munge()
        self._daemon("slurmctld", "-f", str(self.configuration), "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self, timeout_s: float = 60.0) -> None:
        """Until every node is up and free."""

        def idle() -> bool:
            states = self.call("sinfo", "-h", "-N", "-p", "urgent", "-o", "%T", check=False).split()
            return states == ["idle"] * NODES

        wait_for(idle, "idle nodes", timeout_s=timeout_s)

    def stop(self) -> None:
        """End all jobs, the daemons, and whatever is left below them."""
        jobs = self.call("squeue", "-h", "-o", "%A", check=False).split()
        for job in jobs:
            self.call("scancel", "--full", "--signal=KILL", job, check=False)
            self.call("scancel", job, check=False)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not any(self._step_managers()), "jobs to end", timeout_s=75)
        for name in (*self.nodes, "slurmctld"):
            with contextlib.suppress(OSError, ValueError, psutil.Error):
                daemon = psutil.Process(int((self.folder / f"{name}.pid").read_text()))
                daemon.terminate()
                daemon.wait(timeout=50)
        _forget_hosts(self.nodes)

    def _step_managers(self, node: str | None = None) -> Iterator[psutil.Process]:
        """Those of this cluster, or of one node: the environment of what they run tells, they all look the same."""
        nodes = self.nodes if node is None else [node]
        for process in psutil.process_iter(["name", "status"]):
            if process.info["name"] != "slurmstepd" or process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            with contextlib.suppress(psutil.Error):
                if any(child.environ().get("SLURMD_NODENAME") in nodes for child in process.children()):
                    yield process

    def _daemon(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=150)

    def _configure(self) -> None:
        names = f"{self.prefix}[1-{NODES}]"
        devices = self.folder / "gpu"
        for folder in (self.folder / "controller", devices, *(self.folder / node for node in self.nodes)):
            folder.mkdir(parents=True)
        for gpu in range(GPUS):
            os.mknod(devices / f"gpu{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        ports = _free_ports(NODES + 1)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=1000000 "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=False)
        )
        (self.folder / "gres.conf").write_text(f"NodeName={names} Name=gpu File={devices}/gpu[0-{GPUS - 1}]\n")
        self.configuration.write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                port=ports[-1],
                nodes=nodes,
                credential_s=CREDENTIAL_S,
                kill_wait_s=KILL_WAIT_S,
                node_timeout_s=NODE_TIMEOUT_S,
                grace_s=GRACE_S,
            )
        )
        with _alone(), HOSTS.open("a") as hosts:
            hosts.writelines(f"127.0.0.1 {node}\n" for node in self.nodes)


@contextlib.contextmanager
def local_cluster(folder: Path) -> Iterator[LocalCluster]:
    """A cluster in an empty folder, stopped again at the end whatever happened."""
    cluster = LocalCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float, every_s: float = 0.1) -> None:
    """Look until it is so.

    Raises:
        AssertionError: it was not so for `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(every_s)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keep other clusters of this machine from its list of hosts and its munge."""
    with HOSTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start_munge() -> None:
    with _alone():
        _start_munge_alone()


def _start_munge_alone() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
        return
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True)
    wait_for(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, "munge", timeout_s=50)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _forget_hosts(nodes: list[str]) -> None:
    """Written in place: in a container the file is a mount and cannot be replaced."""
    with _alone():
        lines = HOSTS.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not set(line.split()) & set(nodes)]
        if kept != lines:
            with HOSTS.open("r+") as hosts:  # never empty, since daemons of other clusters read it
                hosts.write("".join(kept))
                hosts.truncate()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with local_cluster(Path(sys.argv[1]).resolve()) as running:
        print(f"export SLURM_CONF={running.configuration}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
