"""Several tensors to one rank in one message: the exchange that attention's strategies share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, start_pairs
from xdist.comm.pending import Pending

Spec = tuple[tuple[int, ...], torch.dtype]


def start_packed(
    sends: Mapping[int, Sequence[Tensor]],
    receives: Mapping[int, Sequence[Spec]],
    group: ProcessGroup | None,
    *,
    move: str,
    device: torch.device,
) -> Pending[dict[int, list[Tensor]]]:
    """Sends a list of tensors to each rank of `sends`, receives lists of the given specs.

    One message a pair of ranks, without padding: the tensors' bytes one after another, the widest
    dtype first so that each starts where its dtype may. This rank itself takes no part.
    """
    outgoing = {rank: _pack(tensors) for rank, tensors in sends.items()}
    incoming = {rank: ((sum(map(_nbytes, s)),), torch.uint8) for rank, s in receives.items()}
    pending = start_pairs(outgoing, incoming, group, move=move, device=device)
    return pending.then(
        lambda got: {rank: _unpack(got[rank], specs) for rank, specs in receives.items()}
    )


def _order(widths: Sequence[int]) -> list[int]:
    """Places of the tensors in the message: widest element first, else as given."""
    return sorted(range(len(widths)), key=lambda i: -widths[i])


def _nbytes(spec: Spec) -> int:
    return prod(spec[0]) * spec[1].itemsize


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    order = _order([tensor.element_size() for tensor in tensors])
    flat = [tensors[i].detach().contiguous().view(-1).view(torch.uint8) for i in order]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _unpack(message: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    start = 0
    for i in _order([dtype.itemsize for _, dtype in specs]):
        shape, dtype = specs[i]
        stop = start + _nbytes(specs[i])
        found[i] = message[start:stop].view(dtype).view(shape)
        start = stop
    return [found[i] for i in range(len(specs))]
