"""Several tensors to one rank in one message: the exchange that attention's strategies share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    dtype first so that each starts where its dtype may. This rank itself takes no part. A list that
    several ranks are sent (the same object) is packed once.
    """
    messages = {id(tensors): _pack(tensors) for tensors in _distinct(sends.values())}
    outgoing = {rank: messages[id(tensors)] for rank, tensors in sends.items()}
    return start_messages(outgoing, receives, group, move=move, device=device)


def start_messages(
    messages: Mapping[int, Tensor],
    receives: Mapping[int, Sequence[Spec]],
    group: ProcessGroup | None,
    *,
    move: str,
    device: torch.device,
) -> Pending[dict[int, list[Tensor]]]:
    """`start_packed` of messages that are filled already."""
    incoming = {rank: ((sum(map(_nbytes, s)),), torch.uint8) for rank, s in receives.items()}
    pending = start_pairs(messages, incoming, group, move=move, device=device)
    return pending.then(
        lambda got: {rank: _unpack(got[rank], specs) for rank, specs in receives.items()}
    )


def new_message(specs: Sequence[Spec], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """A message of these tensors and views of it to fill: for who can free one tensor after
    another once it is in."""
    message = torch.empty(sum(map(_nbytes, specs)), dtype=torch.uint8, device=device)
    return message, _unpack(message, specs)


def _distinct(lists: Iterable[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Each of the lists once, by identity."""
    return list({id(tensors): tensors for tensors in lists}.values())


def _order(widths: Sequence[int]) -> list[int]:
    """Places of the tensors in the message: widest element first, else as given."""
    return sorted(range(len(widths)), key=lambda i: -widths[i])


def _nbytes(spec: Spec) -> int:
    return prod(spec[0]) * spec[1].itemsize


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    # Copied straight into the message: a second copy of a block would be the peak of a ring step.
    specs = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    message, places = new_message(specs, tensors[0].device)
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    return message


def _unpack(message: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """Views of the message as the tensors it holds."""
    found: dict[int, Tensor] = {}
    start = 0
    for i in _order([dtype.itemsize for _, dtype in specs]):
        shape, dtype = specs[i]
        stop = start + _nbytes(specs[i])
        found[i] = message[start:stop].view(dtype).view(shape)
        start = stop
    return [found[i] for i in range(len(specs))]
