"""One launch of every family of kernels, forward and backward: for `bits`, and for a sanitizer.

By itself, under a tool that watches kernels (gpu_sanitizer.py starts it so), it runs each family
once at a short length; many of it at once, each with a share of the families, compile their kernels
into Triton's cache (`ahead`):

    python tests/gpu/gpu_families.py --device cuda --share 0 8
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

Results = dict[str, Any]
# Of a tool's run: tokens of a launch, so few that a kernel slowed a thousand times ends.
SHORT = 200
BEGUN, DONE, BROKE = "family:", "family done:", "family broke:"
# HGRN-2's kernels are those of GLA.
_ALIKE = ("HGRN-2",)


def families(
    tokens: int, dtype: str, device: str, *, small: bool
) -> dict[str, Callable[[], Results]]:
    """Name -> a call that gives outputs and gradients. Documents have uneven lengths; inputs are
    drawn anew, and equal, at each call. small: heads and dims as small as the kernels take."""
    import gpu_ops

    ops = [*(op for op in gpu_ops.OPS if op.name not in _ALIKE), gpu_ops.ATTENTION]
    given = {"tokens": tokens, "dtype": dtype, "device": device, "small": small}
    found: dict[str, Callable[[], Results]] = {
        op.name: functools.partial(_of_op, op, **given) for op in ops
    }
    return found | {
        "linear, both directions merged": functools.partial(_both_ways, **given),
        "merge": functools.partial(_merged, **given),
        "cross entropy": functools.partial(_loss, **given),
    }


def _sizes(tokens: int, small: bool) -> Any:
    import gpu_ops

    # The same as in gpu_parity.py: what is compiled here is not compiled again there.
    if small:
        return gpu_ops.Sizes(tokens, heads=1, key=16, value=16, state=4, channels=8)
    return gpu_ops.Sizes(tokens, heads=4, channels=512)


def _gradients(out: Any, leaves: dict[str, Any]) -> Results:
    import torch

    generator = torch.Generator(device=out.device).manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    found = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **{f"d{name}": x for name, x in zip(leaves, found, strict=True)}}


def _of_op(op: Any, *, tokens: int, dtype: str, device: str, small: bool) -> Results:
    import gpu_ops
    import torch

    cuts = [0, round(0.21 * tokens), round(0.6 * tokens), tokens]
    drawn = gpu_ops.leaves(op, _sizes(tokens, small), getattr(torch, dtype), device)
    leaves = gpu_ops.required(drawn)
    shard = gpu_ops.shard_of(tokens, device, cuts)
    return _gradients(op.call(leaves, shard=shard, backend="triton"), leaves)


def _both_ways(*, tokens: int, dtype: str, device: str, small: bool) -> Results:
    import gpu_ops
    import torch

    import xdist

    scalar = next(op for op in gpu_ops.OPS if op.name == "scalar decay")
    drawn = gpu_ops.leaves(scalar, _sizes(tokens, small), getattr(torch, dtype), device)
    leaves = gpu_ops.required(drawn)
    out = xdist.bidirectional(xdist.linear_attention, leaves, backend="triton", merge=True)
    return _gradients(out, leaves)


def _merged(*, tokens: int, dtype: str, device: str, small: bool) -> Results:
    """Partial results are float32 whatever the inputs are."""
    import torch

    from xdist_kernels.merge import kernels

    heads, dim = (1, 16) if small else (4, 128)
    made = torch.Generator(device=device).manual_seed(0)

    def normal(*sizes: int) -> Any:
        return torch.randn(sizes, generator=made, device=device)

    out, other = normal(1, tokens, heads, dim), normal(1, tokens, heads, dim)
    lse, other_lse = normal(1, tokens, heads), normal(1, tokens, heads)
    ours = kernels("triton")
    ours.merge_(out, lse, other, other_lse)
    ours.merge_sinks_(out, lse, normal(heads).to(getattr(torch, dtype)))
    return {"out": out, "lse": lse}


def _loss(*, tokens: int, dtype: str, device: str, small: bool) -> Results:
    import gpu_ops
    import torch

    import xdist

    width, vocab = (16, 100) if small else (128, 8192)
    made = torch.Generator(device=device).manual_seed(0)
    shapes = {"hidden": (1, tokens, width), "head": (vocab, width)}
    drawn = {n: torch.randn(s, generator=made, device=device) for n, s in shapes.items()}
    leaves = gpu_ops.required({n: x.to(getattr(torch, dtype)) for n, x in drawn.items()})
    labels = torch.randint(vocab, (1, tokens), generator=made, device=device)
    shard = gpu_ops.shard_of(tokens, device)
    loss = xdist.cross_entropy(leaves["hidden"], leaves["head"], labels, shard, backend="triton")
    found = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **{f"d{n}": x for n, x in zip(leaves, found, strict=True)}}


def bits(call: Callable[[], Results], times: int) -> dict[str, Any]:
    """Runs `call` `times` times; a row that says which results were not the same bits each time."""
    import torch

    on = torch.are_deterministic_algorithms_enabled()
    # torch's own share: of its ops that have an exact form, that one. It warns of others.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = call()
        differ: dict[str, int] = {}
        for _ in range(times - 1):
            for name, x in call().items():
                if not _same(x, first[name]):
                    differ[name] = differ.get(name, 0) + 1
    finally:
        torch.use_deterministic_algorithms(on)
    holes = [name for name, x in first.items() if not bool(torch.isfinite(x).all())]
    row = {"runs": times, "results": ", ".join(first)}
    if differ:
        told = ", ".join(f"{name} in {count}" for name, count in differ.items())
        return {**row, "failed": True, "remark": f"not the first run's bits: {told}"}
    if holes:
        return {**row, "failed": True, "remark": f"not finite: {', '.join(holes)}"}
    return row


def ahead(
    dtypes: Sequence[str], tokens: int, device: str, *, small: bool, processes: int, seconds: float
) -> dict[str, Any]:
    """Runs every family once at each dtype, in up to `processes` processes at once; a row.

    What raises, or takes longer than `seconds`, fails nothing: rows of its own tell of it.
    """
    shares = max(1, processes // len(dtypes))
    began, running = time.monotonic(), []
    with contextlib.ExitStack() as logs:
        for dtype in dtypes:
            for share in range(shares):
                # A file, not a pipe: whoever holds a pipe's other end keeps its reader waiting.
                log = logs.enter_context(tempfile.TemporaryFile())
                options = ["--device", device, "--dtype", dtype, "--tokens", str(tokens)]
                options += ["--share", str(share), str(shares), "--seconds", str(int(seconds) or 1)]
                options += ["--beside", str(os.getpid())]
                running.append(
                    (
                        log,
                        subprocess.Popen(
                            [sys.executable, __file__, *options, *["--small"] * small],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                        ),
                    )
                )
        text = ""
        for log, process in running:
            try:
                process.wait(max(0.0, began + seconds + 5.0 - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.seek(0)
            text += log.read().decode(errors="replace")
    done, broke = (len(re.findall(rf"^{mark} ", text, re.M)) for mark in (DONE, BROKE))
    row = {"processes": len(running), "families": done, "seconds": time.monotonic() - began}
    wanted = len(dtypes) * len(families(tokens, dtypes[0], device, small=small))
    if done == wanted:
        return row
    return row | {"remark": f"of {wanted}; {broke} raised, {wanted - done - broke} did not end"}


def _same(x: Any, y: Any) -> bool:
    import torch

    # As bytes: 0.0 and -0.0 differ, a NaN equals itself.
    x, y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return torch.equal(x, y)


def _end_with(process: int) -> None:
    """Ends this process by SIGKILL as soon as `process`, which need not be its parent, has ended.

    PR_SET_PDEATHSIG follows the thread that started this process: inside a sanitizer that may be
    one of the sanitizer's, which ends as it likes.
    """
    try:
        watched = os.pidfd_open(process)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    except (AttributeError, OSError):
        # Linux before 5.3, or a Python that was built there: `--seconds` ends it.
        return

    def wait() -> None:
        select.select([watched], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Each family of its share once; 1 where one raised. Its lines say which one runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=SHORT)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--seconds", type=int, default=0, help="ends by SIGALRM after these")
    parser.add_argument("--beside", type=int, help="ends when this process has ended")
    given = parser.parse_args()
    if given.beside is not None:
        _end_with(given.beside)
    if given.seconds:
        # No handler of ours: it ends a process that is inside a kernel's launch as well.
        signal.alarm(given.seconds)
    import torch

    broke = 0
    found = families(given.tokens, given.dtype, given.device, small=given.small)
    first, step = given.share
    for name, call in [*found.items()][first::step]:
        print(BEGUN, name, flush=True)
        try:
            call()
            if given.device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            traceback.print_exc()
            print(BROKE, name, flush=True)
            broke = 1
            continue
        print(DONE, name, flush=True)
    return broke


if __name__ == "__main__":
    sys.exit(main())
