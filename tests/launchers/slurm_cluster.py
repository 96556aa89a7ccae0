"""A private Slurm of two nodes on this host: munged, slurmctld and two slurmd, without systemd.

`SlurmCluster` starts them under a process of its own that holds their folder. That process ends
them, whatever their jobs left behind, and removes the folder when the cluster is closed or when
whoever opened it is gone, killed included. Slurm's commands find the cluster by `SLURM_CONF`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import pathlib
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATHS = ":".join(str(ROOT / folder) for folder in (".", "kernels", "launchers"))
NODES = ("n0", "n1")
START_S = 60.0
# A requeued job waits this long: Slurm lets the credentials of its last start expire first.
REQUEUE_S = 10

_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
MailProg=/bin/true
MessageTimeout=60
SlurmdTimeout=300
MinJobAge=3600
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=8000 Gres=gpu:4
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=8000 Gres=gpu:4
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """The cluster as a context manager. `folder` holds its files, logs of the daemons included."""

    def __init__(self) -> None:
        # Not under pytest's folder: the path of a socket has at most 107 characters.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SlurmCluster:
        log = (self.folder / "keeper.log").open("wb")
        with log:
            self._keeper = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONPATH": PATHS},
                start_new_session=True,
            )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"ready\n":
            logs = [*self.folder.glob("*.log")]
            text = "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in logs)
            self.close()
            raise RuntimeError(f"the private Slurm did not start\n{text}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster and of its jobs; remove its folder."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            assert self._keeper.stdout is not None
            self._keeper.stdin.close()
            self._keeper.wait(60)
            self._keeper.stdout.close()
            self._keeper = None
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with SLURM_CONF, without variables of another job."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return mine | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self,
        *command: str | os.PathLike[str],
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> str:
        """Run a command against this cluster; its stdout. Raises AssertionError when it fails."""
        done = subprocess.run(
            list(map(os.fspath, command)),
            cwd=cwd,
            env=self.env | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int) -> dict[str, Any]:
        """What slurmctld knows of a job, by the keys of `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(
        self, number: int, states: Sequence[str] = (), *, seconds: float = 240.0
    ) -> dict[str, Any]:
        """Poll until the job is in one of `states` (default: has ended for good); its keys."""
        stop_at = time.monotonic() + seconds
        while True:
            job = self.job(number)
            state = job["JobState"]
            if state in states or (not states and state not in _ALIVE):
                return job
            assert time.monotonic() < stop_at, f"job {number} is still {state}: {job}"
            time.sleep(0.2)

    def cancel(self, number: int) -> None:
        """End a job if it has not ended, and wait until Slurm is done with it."""
        if self.job(number)["JobState"] in _ALIVE:
            self.run("scancel", str(number))
            self.wait_for(number)


_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")


def free_ports(count: int) -> list[int]:
    """TCP ports that are free on the loopback interface now, each another one."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _configure(folder: pathlib.Path) -> dict[str, str]:
    """Write slurm.conf and the key; the environment of daemons and commands."""
    folder.chmod(0o711)  # munged wants its socket's folder to be passable
    host = socket.gethostname().split(".")[0]
    text = _CONF.format(
        folder=folder,
        host=host,
        user=getpass.getuser(),
        ports=free_ports(3),
        requeue_s=REQUEUE_S,
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    # Cards in name only: Slurm gives them out and sets CUDA_VISIBLE_DEVICES.
    for number in range(4):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    gres = f"NodeName=n[0-1] Name=gpu Flags=nvidia_gpu_env File={folder}/gpu[0-3]\n"
    (folder / "gres.conf").write_text(gres, encoding="utf-8")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    for name in ("state", *NODES):
        (folder / name).mkdir(exist_ok=True)
    return os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}


def _keep(folder: pathlib.Path) -> int:
    """Start the daemons, say "ready", and end them when stdin ends or a signal asks for it."""
    from xdist_launchers.processes import Child, adopt_orphans, kill_orphans, stop

    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    env = _configure(folder)
    daemons: list[Child] = []

    def start(name: str, *command: str) -> None:
        program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if program is None:
            raise FileNotFoundError(f"{command[0]} is not installed; run: make slurm-deps")
        with (folder / f"{name}.log").open("wb") as log:
            daemons.append(Child([program, *command[1:]], env, log))

    try:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        # --force: the folder is private to this user, which munged takes for a mistake.
        start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        _poll(daemons, (folder / "munge.socket").exists)
        start("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            start(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        _poll(daemons, lambda: _idle(env))
        print("ready", flush=True)
        # stdin ends with the pipe's last writer, so also when that process was killed.
        while not select.select([sys.stdin], [], [], 1.0)[0]:
            _reap({daemon.pid for daemon in daemons})
        return 0
    finally:
        stop(daemons, term_s=3.0)
        kill_orphans(set())
        shutil.rmtree(folder, ignore_errors=True)


def _reap(spare: set[int]) -> None:
    """Bury step daemons, which came here when slurmd let go of them."""
    from xdist_launchers.processes import children

    for pid in children() - spare:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _poll(daemons: Sequence[Any], true: Callable[[], bool]) -> None:
    stop_at = time.monotonic() + START_S
    while not true():
        if any(daemon.ended for daemon in daemons) or time.monotonic() > stop_at:
            raise RuntimeError(f"a daemon ended, or nothing came for {START_S:g} s")
        time.sleep(0.1)


def _idle(env: Mapping[str, str]) -> bool:
    """Whether both nodes wait for jobs."""
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.split() == ["idle"] * len(NODES)


if __name__ == "__main__":
    sys.exit(_keep(pathlib.Path(sys.argv[1])))
