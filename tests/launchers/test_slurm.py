"""The batch script as text, what its settings may hold, and what it calls; no Slurm is needed."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys

import pytest

from tests.launchers.slurm_cluster import PATHS, ROOT
from xdist.config import Config, override
from xdist.errors import ConfigError, LaunchError
from xdist_launchers import slurm_env, slurm_job
from xdist_launchers.failure import Failure, write_failure
from xdist_launchers.rank_env import LOOPBACK
from xdist_launchers.slurm import launch, render, slurm_problems

STORE = "data.store=some.zarr"


def _run(*words: str, cwd: pathlib.Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "xdist_launchers.cli", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": PATHS} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _options(script: str) -> list[str]:
    return [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_script_in_the_repository_is_what_print_renders() -> None:
    printed = _run("launch", "slurm", "--print")
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.encode() == (ROOT / "slurm" / "train.sh").read_bytes()
    assert os.access(ROOT / "slurm" / "train.sh", os.X_OK)
    assert len(printed.stdout.splitlines()) < 60


def test_a_script_for_a_config_holds_its_settings_and_its_python() -> None:
    settings = [
        "run.name=big",
        "launch.ranks=8",
        "parallel.ulysses=4",
        "slurm.nodes=2",
        "slurm.gpus_per_task=1",
        "slurm.cpus_per_task=6",
        "slurm.memory=64G",
        "slurm.time_minutes=90",
        "slurm.signal_s=300",
        "slurm.partition=gpu,short",
        "slurm.account=team-1",
        'slurm.options=["--qos=long", "--constraint=[a|b]", "--exclusive"]',
        'slurm.modules=["cuda/12.4", "nccl"]',
        "slurm.container=apptainer exec --nv 'my image.sif'",
        "slurm.requeue=false",
    ]
    config = override(Config(), settings)
    assert slurm_problems(config) == []
    script = render(config, "a b.toml", settings, python="/opt/v env/bin/python")
    assert _options(script) == [
        "--job-name=big",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=6",
        "--gpus-per-task=1",
        "--mem=64G",
        "--time=90",
        "--partition=gpu,short",
        "--account=team-1",
        "--signal=B:USR1@300",
        "--no-requeue",
        "--open-mode=append",
        "--output=runs/big/logs/slurm-%j.log",
        "--qos=long",
        "--constraint='[a|b]'",
        "--exclusive",
    ]
    lines = script.splitlines()
    assert "module load cuda/12.4 nccl || exit 3" in lines
    assert f"set -- 'a b.toml' {shlex.join(settings)}" in lines
    inside = "job=(apptainer exec --nv 'my image.sif' \"$python\" -P -m xdist_launchers.slurm_job)"
    assert inside in lines
    # Inside a container the host's interpreter means nothing.
    assert '[[ -n "$python" ]] || python=python3' in lines
    bare = render(
        override(config, ['slurm.container=""']), "c.toml", python="/opt/v env/bin/python"
    )
    assert "[[ -n \"$python\" ]] || python='/opt/v env/bin/python'" in bare


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_example_makes_a_batch_script(path: pathlib.Path) -> None:
    script = launch(str(path), [], render_only=True)
    assert f"set -- {path}" in script.splitlines()


HOSTILE = "$(touch a) `touch b`; touch c & 'touch' \"d\" | tee e > f"


def test_no_setting_is_ever_run_as_a_command(tmp_path: pathlib.Path) -> None:
    """A rendered script is run by bash, with Slurm's commands and Python replaced by a recorder."""
    path = tmp_path / f"{HOSTILE}.toml"
    path.write_text("", encoding="utf-8")
    settings = [
        f"data.store={HOSTILE}",
        f"slurm.container=env {shlex.quote('WORD=' + HOSTILE)}",
        "slurm.options=" + json.dumps(["--comment=" + HOSTILE.replace("'", "")]),
    ]
    script = launch(str(path), settings, render_only=True)
    for name in ("scontrol", "srun", "python3"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/said\necho end\n')
        program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURMD_NODENAME": "n0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"bin", "said", path.name}
    assert f"data.store={HOSTILE}" in (tmp_path / "said").read_text().splitlines()


@pytest.mark.parametrize(
    "setting",
    [
        "slurm.partition=gpu; reboot",
        "slurm.account=a b",
        "slurm.memory=64G --wrap=x",
        "slurm.interface=ib0 ib1",
        'slurm.modules=["--force"]',
        'slurm.modules=["a;b"]',
        'slurm.options=["--qos=a\\nb"]',
        "slurm.options=[\"--comment='x'\"]",
        'slurm.options=["qos=long"]',
        'slurm.options=["-p x"]',
        "run.name=a b",
        "slurm.gpus_per_task=2",
    ],
)
def test_values_outside_of_their_letters_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        override(Config(), [setting])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["launch.ranks=4", "slurm.nodes=3"], "4 ranks cannot be spread evenly"),
        (["slurm.time_minutes=2"], "told to save before it has begun"),
        (["run.threads=4"], "run.threads = 4 do not fit slurm.cpus_per_task = 1"),
        (['slurm.options=["--nodes=3"]'], "slurm.options may not hold '--nodes=3'"),
        (['slurm.options=["--sig=B:TERM@9"]'], "slurm.options may not hold '--sig=B:TERM@9'"),
        (["slurm.container=run 'x"], "is not a command"),
        (["run.directory=a%j"], "cannot stand in a batch script"),
    ],
)
def test_settings_that_no_job_can_honour_end_with_2(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch("", settings, render_only=True)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_without_sbatch_the_command_ends_with_3(tmp_path: pathlib.Path) -> None:
    settings = [STORE, f"run.directory={tmp_path}"]
    done = _run("launch", "slurm", "configs/tiny.toml", *settings, PATH=str(tmp_path))
    assert (done.returncode, done.stderr.splitlines()[0]) == (3, "xdist: sbatch was not found")
    assert _run("launch", "slurm").returncode == 2


def test_a_refusal_of_sbatch_is_shown(tmp_path: pathlib.Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\ncat > /dev/null\necho 'invalid account' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    settings = [STORE, f"run.directory={tmp_path}"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = _run("launch", "slurm", "configs/tiny.toml", *settings, PATH=path)
    assert (done.returncode, done.stderr.splitlines()[1]) == (3, "invalid account")


TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "MASTER_ADDR": LOOPBACK,
    "MASTER_PORT": "20004",
    "PATH": "/bin",
}


def test_a_task_has_torchruns_variables() -> None:
    env = slurm_env.rank_variables(TASK, threads=3, interface="")
    expected = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    expected |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": "20004", "OMP_NUM_THREADS": "3"}
    expected |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "XDIST_LAUNCHER": "slurm"}
    assert {key: env.get(key) for key in expected} == expected
    # Cards that Slurm gave are left as it gave them.
    with_cards = slurm_env.rank_variables(
        TASK | {"SLURM_GPUS_ON_NODE": "2"}, threads=1, interface=""
    )
    assert "CUDA_VISIBLE_DEVICES" not in with_cards
    named = slurm_env.rank_variables(TASK, threads=1, interface="ib0")
    assert (named["GLOO_SOCKET_IFNAME"], named["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert slurm_env.tasks_per_node("1,4(x2)") == [1, 4, 4]


def test_a_process_that_srun_did_not_start_is_refused() -> None:
    environ = {key: value for key, value in TASK.items() if key != "SLURM_PROCID"}
    with pytest.raises(LaunchError, match="SLURM_PROCID is not set"):
        slurm_env.rank_variables(environ, threads=1, interface="")


def test_ports_come_from_the_job_and_do_not_meet() -> None:
    blocks = [slurm_env.ports(job) for job in range(1000, 1100)]
    assert len({port for block in blocks for port in block}) == 100 * slurm_env.TRIES
    assert all(
        20000 <= port < 29500 for job in (1, 2**31, 2374, 2375) for port in slurm_env.ports(job)
    )
    assert slurm_env.ports(7) == slurm_env.ports(7)


def test_a_taken_port_is_replaced_and_four_taken_ports_end_with_3() -> None:
    job = os.getpid()  # nobody else's
    ports = slurm_env.ports(job)
    held = []
    try:
        for port in ports:
            assert slurm_env.free_port(LOOPBACK, job) == port
            holder = socket.socket()
            holder.bind((LOOPBACK, port))
            holder.listen()
            held.append(holder)
        with pytest.raises(LaunchError, match="no port is free") as caught:
            slurm_env.free_port(LOOPBACK, job)
        assert caught.value.exit_code == 3
        assert all(str(port) in caught.value.why for port in ports)
    finally:
        for holder in held:
            holder.close()
    assert slurm_env.free_port(LOOPBACK, job, attempt=1) == ports[1]


def test_the_meeting_is_at_the_right_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_env.master_address("whatever", "", 1) == LOOPBACK
    assert slurm_env.master_address("127.0.0.1", "", 2) == LOOPBACK  # nodes of one host
    assert slurm_env.master_address("n0", "lo", 2) == LOOPBACK
    assert slurm_env.interface_towards("127.0.0.1") == "lo"
    with pytest.raises(LaunchError, match="'nonesuch0' has no IPv4 address"):
        slurm_env.master_address("n0", "nonesuch0", 2)
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    with pytest.raises(LaunchError, match=r"stands for 127\.0\.1\.1") as caught:
        slurm_env.master_address("n0", "", 2)
    assert caught.value.do.startswith("set slurm.interface to one of: ")


@pytest.fixture
def ended(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Call `end` for two ranks: what it printed, its code, what it told, and status.json."""
    config = tmp_path / "run.toml"
    config.write_text(f'[run]\ndirectory = "{tmp_path}"\nname = "r"\n', encoding="utf-8")
    logs = tmp_path / "r" / "logs"
    logs.mkdir(parents=True)
    monkeypatch.setenv("SLURM_NTASKS", "2")

    def call(
        code: int,
        asked: str = "no",
        *,
        codes: tuple[int, ...] = (),
        why: tuple[tuple[int, str, str, float], ...] = (),
    ):
        for rank, number in enumerate(codes):
            (logs / f"rank-{rank}.ended").write_text(f"{number}\n")
        for rank, (number, kind, text, when) in enumerate(why):
            failure = Failure(rank, f"n{rank}", number, kind, "what", text, "do", "", when)
            write_failure(failure, logs / f"rank-{rank}.error.json")
        got = slurm_job.main(["end", str(code), asked, str(config)])
        out, err = capsys.readouterr()
        status = tmp_path / "r" / "status.json"
        told = json.loads(status.read_text()) if status.exists() else {}
        return out.strip(), got, err, told

    return call


def test_the_end_of_success_and_of_a_save(ended) -> None:
    assert ended(0, codes=(0, 0))[:2] == ("end", 0)
    assert ended(75, codes=(75, 75))[:2] == ("end", 75)
    assert ended(75, "yes", codes=(75, 75))[:2] == ("requeue", 75)
    # srun ended a task that was about to end with 75.
    assert ended(143, "yes", codes=(75, 75))[:2] == ("requeue", 75)


def test_the_code_of_the_rank_that_failed_first_is_the_jobs(ended) -> None:
    lost = (7, "PeerLost", "rank 1 is gone", 1.0)
    out, code, err, status = ended(7, codes=(7, 5), why=(lost, (5, "DataError", "bad chunk", 2.0)))
    assert (out, code, status["exit_code"], status["rank"], status["host"]) == (
        "end",
        5,
        5,
        1,
        "n1",
    )
    assert "bad chunk" in err


def test_an_abort_is_a_consequence_of_a_kill(ended) -> None:
    abort = (7, "RankKilled", "killed by signal 6 (SIGABRT), host", 1.0)
    killed = (7, "RankKilled", "killed by signal 9 (SIGKILL), host", 2.0)
    assert ended(7, codes=(7, 7), why=(abort, killed))[3]["rank"] == 1


def test_ranks_without_a_reason_were_killed_or_never_started(ended) -> None:
    out, code, err, status = ended(137)
    assert (out, code, status["exit_code"]) == ("end", 7, 7)
    assert "srun ended with 137: signal 9" in err
    assert ended(1)[1] == 3


def test_make_slurm_deps_installs_what_is_missing_and_only_then(tmp_path: pathlib.Path) -> None:
    for name in ("apt-get", "sudo"):
        text = '#!/bin/sh\necho "ran apt-get $*"\n' if name == "apt-get" else '#!/bin/sh\n"$@"\n'
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def make(programs: str) -> str:
        command = ["make", "--no-print-directory", "slurm-deps", f"SLURM_PROGRAMS={programs}"]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert make("sh env") == ""
    said = make("sh nonesuch-1")
    assert said.startswith("not installed: nonesuch-1; running: ")
    assert "ran apt-get install" in said
    assert "slurm-wlm munge shellcheck" in said
