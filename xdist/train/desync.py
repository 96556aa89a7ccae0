"""Failure 15: values that must be equal on all ranks and are not.

Each tensor's bits are hashed on its device to 64 bits: words times weights that depend on their
place, added modulo 2^64, so that a changed bit, or two words that changed places, change the hash.
One exchange of one integer a rank compares all of them; only when it differs do the ranks exchange
a hash a tensor, to name the first.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from xdist.comm.collectives import exchange_integers
from xdist.errors import DesyncError
from xdist.mesh import Mesh
from xdist.train.agree import share_json_rows

_BLOCK = 1 << 18  # words hashed at a time: 2 MiB of int64 beside the tensor
# Odd, so that multiplication by them loses no bit (of the golden ratio and of pi).
_PLACE, _BLOCKS = -7046029254386353131, 0x243F6A8885A308D3
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_of(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and their places: int64 [], on its device."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    words = flat.contiguous().view(_WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    size = min(_BLOCK, max(words.numel(), 1))
    weights = (torch.arange(size, dtype=torch.int64, device=flat.device) * 2 + 1) * _PLACE
    for start in range(0, words.numel(), _BLOCK):
        block = words[start : start + _BLOCK].to(torch.int64)
        # A zero word is counted by its place too, so that lengths differ.
        total = total * _BLOCKS + ((block + 1) * weights[: block.numel()]).sum()
    return total


def check_equal(tensors: Iterable[tuple[str, Tensor]], mesh: Mesh, *, when: str) -> None:
    """Compare `tensors` between all ranks (data x sequence); every rank calls it.

    Control bytes: 8 to each other rank.

    Raises:
        DesyncError: on all ranks alike, naming the ranks and the first tensor that differs.
    """
    if mesh.parameter_group is None:
        return
    named = list(tensors)
    hashes = [hash_of(tensor) for _, tensor in named]
    device = mesh.device
    column = torch.stack([h.to(device) for h in hashes]) if hashes else torch.zeros(1).long()
    mine = int(hash_of(column))
    all_hashes = exchange_integers([mine], mesh.parameter_group)
    if len(set(all_hashes)) == 1:
        return
    raise _difference([name for name, _ in named], column.tolist(), mesh, when)


def _difference(names: list[str], hashes: list[int], mesh: Mesh, when: str) -> DesyncError:
    facts = {"names": names, "hashes": hashes, "host": socket.gethostname()}
    rows = share_json_rows(facts, mesh)
    usual = _most([tuple(row["hashes"]) for row in rows])
    odd = [rank for rank, row in enumerate(rows) if tuple(row["hashes"]) != usual]
    reference = rows[next(rank for rank in range(len(rows)) if rank not in odd)]
    known = reference["names"]
    first = next(
        (
            name
            for i, name in enumerate(known)
            if any(
                row["names"][i : i + 1] != [name] or row["hashes"][i] != usual[i] for row in rows
            )
        ),
        "a tensor that the others do not have",
    )
    differ = sum(
        any(row["hashes"][i : i + 1] != [usual[i]] for row in rows) for i in range(len(known))
    )
    who = ", ".join(f"rank {rank} on {rows[rank]['host']}" for rank in odd)
    even = len(odd) * 2 == len(rows)
    error = DesyncError(
        f"the ranks hold different values {when}: {who} "
        f"differ{'s' if len(odd) == 1 else ''} from {'rank 0' if even else 'the others'}, "
        f"first in {first}",
        f"{differ} of {len(known)} tensors differ, by 64-bit hashes over {len(rows)} ranks",
        "no checkpoint is made of it: start again from the last one; if it comes back, suspect the "
        "memory of that host, or code that draws or updates differently on each rank",
    )
    error.rank, error.host = odd[0], rows[odd[0]]["host"]  # type: ignore[attr-defined]
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _most(values: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The value of most ranks; of several, that of the lowest rank."""
    counts = Counter(values)
    return max(values, key=lambda value: counts[value])
