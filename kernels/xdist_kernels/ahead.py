"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU, and tells what each one needs.

    python -m xdist_kernels.ahead [--target sm_90] [--family linear] [--out docs/kernels] [--all]
    python -m xdist_kernels.ahead --check

A family names calls in `cases()` of its triton_cases.py or triton.py, and more of them in
`variants()`, of which only those launches are taken that none before covers (ahead_cover.py). Each
call is made under `recording`, where nothing runs: what it would start is listed and compiled as it
would be on a card. The table (compiled.md, compiled.json) holds shared memory, registers, spilled
bytes and the matrix instructions of each kernel. A row has a key: the hash of
what the compiler reads (sources, types, constants, warps, stages, target). Rows whose key is in the
table already are kept; --all compiles them too. --check fails where the table lacks a key, or where
a row needs more shared memory than a program has; it compiles nothing but --again so many rows,
spread over the table.

Nothing may set TRITON_INTERPRET: kernels of the interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import xdist_kernels
from xdist_kernels import ahead_table
from xdist_kernels.ahead_cover import Cover
from xdist_kernels.ahead_table import Row
from xdist_kernels.errors import KernelError
from xdist_kernels.launch import AMPERE, HOPPER, Launch, Target, interpreted, recording

# So many kernels are compiled between two writings of the table.
BATCH = 64
TARGETS = {f"sm_{target.capability}": target for target in (AMPERE, HOPPER)}


class Planned(NamedTuple):
    """One kernel to compile: where it was found first, for what, and what names it."""

    family: str
    case: str
    target: str
    launch: Launch
    key: str


def families() -> dict[str, Any]:
    """Family -> the module that holds its `cases`, for each that has some."""
    found = {}
    for package in pkgutil.iter_modules(xdist_kernels.__path__):
        if not package.ispkg:
            continue
        for name in ("triton_cases", "triton"):
            path = f"xdist_kernels.{package.name}.{name}"
            if find_spec(path) is None:
                continue
            module = importlib.import_module(path)
            if hasattr(module, "cases"):
                found[package.name] = module
                break
    return found


def planned(target: str, wanted: Sequence[str] = ()) -> Iterator[Planned]:
    """Every kernel that the families' cases start on `target`, each with its constants once, and
    those of their variants that no launch before them covers."""
    seen = set()
    for family, module in families().items():
        if wanted and family not in wanted:
            continue
        cover = Cover()
        known: set[Launch] = set()
        for case, call, whole in _calls(module):
            with recording(TARGETS[target]) as launches:
                call()
            for launch in launches:
                # Most calls start what others have started: to look once is enough.
                same = replace(launch, programs=0)
                if same in known:
                    continue
                known.add(same)
                if not whole and not cover.lacks(launch):
                    continue
                cover.add(launch)
                key = key_of(launch, TARGETS[target])
                if key not in seen:
                    seen.add(key)
                    yield Planned(family, case, target, launch, key)


def _calls(module: Any) -> Iterator[tuple[str, Callable[[], object], bool]]:
    """(case, call, whether all of its launches are taken) of a family."""
    yield from ((case, call, True) for case, call in module.cases())
    if hasattr(module, "variants"):
        yield from ((case, call, False) for case, call in module.variants())


def key_of(launch: Launch, target: Target) -> str:
    """16 digits of the hash of all that the compiler reads; comments and places are none of it."""
    constants = [
        (name, _sources(value) if _is_kernel(value) else repr(value))
        for name, value in launch.constants
    ]
    read = [
        _sources(launch.kernel),
        launch.signature,
        constants,
        sorted(launch.aligned),
        launch.config,
        target.capability,
    ]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


def _is_kernel(value: Any) -> bool:
    return hasattr(value, "src") and hasattr(value, "__globals__")


@functools.cache
def _sources(kernel: Any) -> str:
    """The hash of a kernel's syntax tree, of those it calls here, and of constants they read."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        current = waiting.pop()
        name = f"{current.__module__}.{current.__qualname__}"
        if name in found:
            continue
        tree = ast.parse(current.src)
        found[name] = ast.dump(tree)
        for value, label in _read_by(tree, current.__globals__):
            if _is_kernel(value) and value.__module__.startswith("xdist_kernels"):
                waiting.append(value)
            elif type(value).__name__ == "constexpr":
                found[label] = repr(value.value)
    text = "\n".join(f"{name}: {found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_by(tree: ast.AST, names: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """The values of a module that a function reads, by name or as an attribute of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            yield names[node.id], node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            holder = names.get(node.value.id)
            if isinstance(holder, type(sys)):
                label = f"{node.value.id}.{node.attr}"
                yield getattr(holder, node.attr, None), label


def compiled(plan: Planned) -> Row:
    """What the kernel needs on its target; a row with "error" where it does not compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    launch = plan.launch
    places = {name: (i,) for i, (name, _) in enumerate(launch.signature)}
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {places[name]: value for name, value in launch.constants},
        {places[name]: [["tt.divisibility", 16]] for name in sorted(launch.aligned)},
    )
    row: Row = {
        "key": plan.key,
        "family": plan.family,
        "case": plan.case,
        "kernel": launch.kernel.__name__,
        "target": plan.target,
        "warps": launch.config.warps,
        "stages": launch.config.stages,
    }
    try:
        found: Any = compile(
            source,
            target=GPUTarget("cuda", TARGETS[plan.target].capability, 32),
            options={"num_warps": launch.config.warps, "num_stages": launch.config.stages},
        )
    except Exception as error:
        # Any failure of any pass is this row's finding, and fails the command.
        return {**row, "error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    registers, spilled = _resources(found.asm["cubin"])
    row |= {"shared_bytes": int(found.metadata.shared), "registers": registers}
    return {**row, "spilled_bytes": spilled, "matrix": _matrix(found.asm["ptx"])}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes a thread keeps in local memory because they do not suffice."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([str(tool), "--dump-resource-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise KernelError(f"{tool} told no registers: {text[:200]}")
    return int(found[1]), int(found[2])


def _matrix(ptx: str) -> str:
    """Which matrix instructions it uses: Hopper's, those of earlier cards, or none."""
    for name in ("wgmma", "mma.sync"):
        if f"{name}." in ptx:
            return name.partition(".")[0]
    return "none"


def too_large(row: Row) -> str:
    """Why a row fails, "" where it does not."""
    where = f"{row['kernel']} for {row['target']} ({row['case']})"
    if "error" in row:
        return f"{where}: {row['error']}"
    limit = TARGETS[row["target"]].shared_bytes
    if row["shared_bytes"] > limit:
        return f"{where}: {row['shared_bytes']} bytes of shared memory, a program has {limit}"
    return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m xdist_kernels.ahead", description=__doc__)
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default: all")
    parser.add_argument("--family", action="append", default=[], help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/kernels"), help="of the table")
    parser.add_argument("--all", action="store_true", help="compile what the table holds, too")
    parser.add_argument("--check", action="store_true", help="judge the table")
    parser.add_argument("--again", type=int, default=0, help="with --check: compile so many")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0: all compile within the limits; 1: some do not, or --check found the table out of date."""
    given = _arguments(argv)
    if find_spec("triton") is None or interpreted():
        print("ahead: needs triton, in a process without TRITON_INTERPRET")
        return 2
    began = time.perf_counter()
    targets = given.target or list(TARGETS)
    plans = [plan for target in targets for plan in planned(target, given.family)]
    if given.check:
        rows, failures, made = _checked(plans, given)
    else:
        rows, failures, made = _tabulated(plans, targets, given)
    failures += [why for row in rows if (why := too_large(row))]
    for why in failures:
        print(f"FAILED {why}")
    spilled = sum(row.get("spilled_bytes", 0) > 0 for row in rows)
    print(
        f"{len(plans)} kernels for {', '.join(targets)}: {made} compiled, {spilled} spill, "
        f"{len(failures)} failed, {time.perf_counter() - began:.0f} s"
    )
    return 1 if failures else 0


def _compile_all(plans: list[Planned], jobs: int) -> dict[str, Row]:
    # Compiler passes and ptxas run without Python's lock: threads keep the cores busy.
    with ThreadPoolExecutor(jobs) as pool:
        return {row["key"]: row for row in pool.map(compiled, plans)}


def _tabulated(
    plans: list[Planned], targets: list[str], given: argparse.Namespace
) -> tuple[list[Row], list[str], int]:
    """Compiles what the table lacks and writes it anew, also on the way: it takes minutes."""
    before = ahead_table.read(given.out)
    held = {} if given.all else dict(before)
    missing = [plan for plan in plans if plan.key not in held]
    # What was not asked for this time stays as it was.
    others = [
        row
        for row in before.values()
        if row["target"] not in targets or (given.family and row["family"] not in given.family)
    ]
    rows: list[Row] = []
    for start in range(0, len(missing) or 1, BATCH):
        made = _compile_all(missing[start : start + BATCH], given.jobs)
        held |= made
        # A kept row stands under the case that starts it today.
        rows = [
            {**held[plan.key], "family": plan.family, "case": plan.case}
            for plan in plans
            if plan.key in held
        ]
        ahead_table.write(given.out, [row for row in rows if "error" not in row] + others, TARGETS)
        print(f"{min(start + BATCH, len(missing))} of {len(missing)} compiled", flush=True)
    return rows, [], len(missing)


def _checked(plans: list[Planned], given: argparse.Namespace) -> tuple[list[Row], list[str], int]:
    """The table's rows of what is planned; fails for what it lacks, and for a row that has
    changed where --again compiles it again."""
    held = ahead_table.read(given.out, any_triton=True)
    failures = [
        f"not in the table: {plan.launch.kernel.__name__} for {plan.target} ({plan.case}); "
        "run make ahead"
        for plan in plans
        if plan.key not in held
    ]
    there = [plan for plan in plans if plan.key in held]
    step = max(1, len(there) // given.again) if given.again else len(there) + 1
    made = _compile_all(there[step - 1 :: step], given.jobs)
    same = ahead_table.read(given.out)
    for key, row in made.items():
        if why := too_large(row):
            failures.append(why)
        elif key in same and row["shared_bytes"] != held[key]["shared_bytes"]:
            failures.append(
                f"the table has other shared memory for {row['kernel']} ({row['case']})"
            )
    return [held[plan.key] for plan in there], failures, len(made)


if __name__ == "__main__":
    sys.exit(main())
