"""`xdist doctor`: what it finds, and its three forms."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import subprocess
import sys
import time

import pytest

from tests.launchers.conftest import PATHS
from tests.launchers.slurm_cluster import SlurmCluster
from tests.launchers.test_cli import XDIST, xdist
from xdist_launchers import doctor, doctor_machine, doctor_places, findings
from xdist_launchers.findings import Finding


def _json(*words: str, **env: str) -> tuple[dict[str, dict[str, str]], int]:
    done = xdist("doctor", "--json", *words, **env)
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.returncode
    return {finding["name"]: finding for finding in found["findings"]}, done.returncode


def test_it_looks_at_everything_and_loads_no_torch(tmp_path: pathlib.Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    found, code = _json(PYTHONPATH=f"{tmp_path}:{PATHS}")
    assert code == 0
    assert set(found) >= {
        *("xdist", "python", "torch", "zarr", "system", "cores", "memory", "/dev/shm"),
        *("device", "network", "clock", "local", "torchrun", "mpi", "slurm", "ray", "job"),
        *("ports", "host name", "disk", "writing", "shared", "deepspeed", "tensorboard"),
    }
    assert "fsync and rename work" in found["writing"]["text"]
    assert "free ports are drawn from" in found["ports"]["text"]
    assert "mpi4py" in found["mpi"]["text"]


def test_plain_lines_elsewhere_and_a_table_on_a_terminal() -> None:
    plain = xdist("doctor").stdout
    assert "\x1b" not in plain
    assert all(len(line) > 14 for line in plain.splitlines())
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*XDIST, "doctor"],
        env=os.environ | {"PYTHONPATH": PATHS, "TERM": "xterm", "COLUMNS": "120"},
        stdout=theirs,
        stderr=subprocess.STDOUT,
    )
    os.close(theirs)
    shown = b""
    stop_at = time.monotonic() + 60
    while time.monotonic() < stop_at:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "✓" in text
    for group in ("software", "machine", "launchers", "network", "folder of runs", "features"):
        assert group in text
    assert "xdist works here" in text


def test_what_is_missing_comes_with_the_command_that_adds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    lacking = {"zarr", "deepspeed", "tensorboard", "ray", "mpi4py"}
    known = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "" if name in lacking else known(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor_places, "_bin", lambda: tmp_path)
    found = {finding.name: finding for finding in doctor.findings(tmp_path)}
    assert (found["zarr"].state, found["zarr"].do) == ("bad", "pip install zarr")
    for name in ("deepspeed", "tensorboard", "ray", "mpi", "slurm"):
        assert found[name].state == "absent"
    assert found["deepspeed"].do == "pip install 'xdist-train[deepspeed]'"
    assert 'engine.name = "deepspeed" needs it' in found["deepspeed"].text
    assert found["ray"].do == "pip install 'xdist-train[ray]'"
    assert found["mpi"].text.startswith("mpi4py and mpirun absent")
    assert "pip install 'xdist-train[mpi]'" in found["mpi"].do
    listed = list(found.values())
    assert findings.exit_code(listed) == 3
    assert "zarr          MISSING; pip install zarr" in findings.lines(listed)


def test_the_clash_with_pytest_xdist_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.version
    monkeypatch.setattr(
        doctor, "version", lambda name: "3.8" if name == "pytest-xdist" else known(name)
    )
    clash = next(finding for finding in doctor._software() if finding.name == "clash")
    assert clash.state == "bad"
    assert "pip uninstall -y pytest-xdist" in clash.do


# Two pairs by NVLink, the others over PCIe; `nvidia-smi topo -m` prints such a table.
TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tSYS\tPIX\t0-15
GPU1\tNV18\t X \tSYS\tSYS\t0-15
GPU2\tSYS\tSYS\t X \tSYS\t16-31
NIC0\tPIX\tSYS\tSYS\t X

Legend:
"""


def test_links_of_cards_are_told_by_kind() -> None:
    assert doctor_machine._card_links(TOPOLOGY) == ["NV18: 0-1", "SYS: 0-2, 1-2"]
    assert doctor_machine._card_links("") == []


NVIDIA_SMI = f"""#!/bin/sh
case "$1" in
  -L) echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H200 (UUID: GPU-2)';;
  topo) printf '%s' '{TOPOLOGY}';;
esac
"""


def test_devices_and_their_links_come_from_the_drivers_tool(tmp_path: pathlib.Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    told = xdist("doctor", PATH=f"{tmp_path}:{os.environ['PATH']}").stdout
    assert told.count("NVIDIA H200") == 2
    assert "card links    NV18: 0-1\ncard links    SYS: 0-2, 1-2" in told


def test_a_job_around_the_command_is_told() -> None:
    found, _ = _json(SLURM_JOB_ID="7", SLURM_NTASKS="4")
    assert found["job"]["state"] == "note"
    assert "Slurm job 7" in found["job"]["text"]
    assert "Slurm job says 4 tasks" in found["job"]["text"]


def test_a_folder_that_cannot_be_written_is_bad_and_that_of_a_config_is_looked_at(
    tmp_path: pathlib.Path,
) -> None:
    found = {finding.name: finding for finding in doctor_places.folder(pathlib.Path("/proc/xdist"))}
    assert found["writing"].state == "bad"
    assert "set run.directory" in found["writing"].do
    config = tmp_path / "run.toml"
    config.write_text(f'[run]\nname = "seen"\ndirectory = "{tmp_path}/deep"\n')
    told, code = _json(str(config))
    assert code == 0
    assert told["disk"]["text"].startswith(f"{tmp_path}/deep/seen on ")
    assert not (tmp_path / "deep").exists()


def test_types_of_file_systems() -> None:
    assert doctor_places.file_system(pathlib.Path("/proc/self")) == "proc"
    assert doctor_places.file_system(pathlib.Path("/dev/shm")) == "tmpfs"
    told = {f.name: f for f in doctor_places.folder(pathlib.Path("/dev/shm"))}
    assert "lost at a reboot" in told["shared"].text


def test_each_state_has_a_line() -> None:
    told = findings.lines(
        [
            Finding("g", "one", "fine"),
            Finding("g", "two", "odd", "note", "look"),
            Finding("g", "three", "", "bad", "add it"),
        ]
    )
    assert told == [
        "one           fine",
        "two           note: odd; look",
        "three         MISSING; add it",
    ]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_in_a_job_of_two_nodes_both_are_asked_whether_they_see_the_folder(
    slurm: SlurmCluster, tmp_path: pathlib.Path
) -> None:
    out = slurm.run(
        *("salloc", "-N2", "-n2", "env", f"PYTHONPATH={PATHS}"),
        *(sys.executable, "-P", "-m", "xdist_launchers.cli", "doctor", "--json"),
    )
    found = json.loads(out[out.index("{") :])["findings"]
    shared = next(finding for finding in found if finding["name"] == "shared")
    assert shared["text"] == "all 2 nodes of this job see it", shared
