"""What `xdist doctor` says of this machine: cores, memory, devices, links, clock. Linux."""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import shutil
import subprocess

from xdist_launchers.findings import Finding

GROUP = "machine"
_GIB = 2**30
_TIME_ERROR = 5  # adjtimex: nobody keeps this clock in time
_TOOL_S = 20


def memory_bytes() -> tuple[int, int]:
    """Available and total memory of this host (or of this cgroup, where that is less)."""
    fields = {}
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    available, total = fields["MemAvailable"], fields["MemTotal"]
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (FileNotFoundError, PermissionError):
        return available, total
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = max(0, min(available, total - used))
    return available, total


def machine() -> list[Finding]:
    """Cores, memory, shared memory, devices, links and clock."""
    available, total = memory_bytes()
    cores = len(os.sched_getaffinity(0))
    return [
        Finding(GROUP, "system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding(GROUP, "cores", f"{cores} usable of {os.cpu_count()}"),
        Finding(GROUP, "memory", f"{available / _GIB:.1f} GiB available of {total / _GIB:.1f} GiB"),
        _shared_memory(),
        *_devices(),
        *_links(),
        _clock(),
    ]


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Finding(GROUP, "/dev/shm", f"not usable: {error}", "note")
    text = f"{free / _GIB:.1f} GiB free"
    if free >= _GIB:
        return Finding(GROUP, "/dev/shm", text)
    do = "in a container, raise it: docker run --shm-size=8g"
    return Finding(GROUP, "/dev/shm", f"{text}; NCCL and DeepSpeed keep buffers there", "note", do)


def _devices() -> list[Finding]:
    listed = _tool("nvidia-smi", "-L")
    if not listed:
        why = "nvidia-smi finds none" if shutil.which("nvidia-smi") else "no nvidia-smi"
        return [Finding(GROUP, "device", f"CPU only ({why})")]
    return [Finding(GROUP, "device", line.partition(" (UUID")[0]) for line in listed.splitlines()]


def _links() -> list[Finding]:
    """NVLink or PCIe between cards, InfiniBand ports, and the network interfaces that are up."""
    found = [
        Finding(GROUP, "card links", text)
        for text in _card_links(_tool("nvidia-smi", "topo", "-m"))
    ]
    for port in sorted(pathlib.Path("/sys/class/infiniband").glob("*/ports/*")):
        state = _word(port / "state").partition(": ")[2] or "unknown"
        text = f"{port.parent.parent.name} port {port.name}: {state}, {_word(port / 'rate')}"
        found.append(Finding(GROUP, "infiniband", text, "ok" if state == "ACTIVE" else "note"))
    up = []
    for entry in sorted(pathlib.Path("/sys/class/net").glob("*")):
        if entry.name != "lo" and _word(entry / "operstate") in ("up", "unknown"):
            speed = _word(entry / "speed")
            fast = f" ({int(speed) / 1000:g} Gb/s)" if speed.isdigit() and int(speed) else ""
            up.append(entry.name + fast)
    text = ", ".join(up) or "loopback only"
    return [*found, Finding(GROUP, "network", text)]


def _card_links(matrix: str) -> list[str]:
    """Each pair of cards by the kind of link, from the matrix of `nvidia-smi topo -m`."""
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    kinds: dict[str, list[str]] = {}
    for first, row in enumerate(rows):
        for second in range(first + 1, len(rows)):
            if second + 1 < len(row):
                kinds.setdefault(row[second + 1], []).append(f"{first}-{second}")
    return [f"{kind}: {_few(pairs)}" for kind, pairs in kinds.items()]


def _few(pairs: list[str]) -> str:
    return ", ".join(pairs) if len(pairs) <= 6 else f"{len(pairs)} pairs of cards"


def _clock() -> Finding:
    # struct timex is 208 bytes; modes = 0 only reads.
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))
    except (OSError, AttributeError):
        return Finding(GROUP, "clock", "cannot be asked")
    if state == _TIME_ERROR:
        text = "not kept in time: logs of several hosts will not line up"
        return Finding(GROUP, "clock", text, "note", "run chronyd or systemd-timesyncd")
    return Finding(GROUP, "clock", "kept in time" if state >= 0 else "cannot be asked")


def _tool(*command: str) -> str:
    """What a tool prints; "" when it is absent or fails."""
    path = shutil.which(command[0])
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, timeout=_TOOL_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _word(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
