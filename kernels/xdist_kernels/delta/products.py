"""What tokens of a chunk see of earlier ones: masked and decayed products of rows with keys.

    scores_ij = <row_i, D_ij key_j> for j <= i (rows are queries) or j < i (rows are keys), else 0

Queries and keys are one stack of rows [N, 2C, K], queries above keys, so that both share each
product. With one decay a token D is a table of numbers; with one a key dim, D_ij differs for each,
and the chunk is halved again and again (`chunks.levels`): rows of the second half decay from the
middle, keys of the first half decay to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.delta.chunks import Decays, block_of, halves, levels, scalar_decays


def _mask(scores: Tensor, decays: Decays | None) -> Tensor:
    """scores [N, 2C, C] times D of no or a scalar decay, in place."""
    chunk = scores.shape[-1]
    both = scores.view(-1, 2, chunk, chunk)
    if decays is None or decays.within is None:
        both[:, 0].tril_()
        both[:, 1].tril_(-1)
        return scores
    both.mul_(decays.within[:, None])
    both[:, 1].diagonal(0, 1, 2).zero_()
    return scores


def scores(both: Tensor, token: Tensor | None) -> tuple[Tensor, Decays | None]:
    """scores [N, 2C, C] and the decays they were made with, from rows [N, 2C, K] and the tokens'
    decays [N, C, 1], [N, C, K] or None (all are 1)."""
    chunk = both.shape[1] // 2
    keys = both[:, chunk:]
    if token is None or token.shape[-1] == 1:
        decays = None if token is None else scalar_decays(token)
        return _mask(torch.bmm(both, keys.mT), decays), decays
    keys = keys.contiguous()
    found = both.new_zeros(both.shape[0], 2, chunk, chunk)
    found[:, 0].diagonal(0, 1, 2).copy_(torch.linalg.vecdot(both[:, :chunk], keys))
    since, until = token.clone(), torch.ones_like(token)
    for level in levels(token, since, until):
        rows = _late(both, level.half) * level.query[:, None]
        seen = torch.bmm(rows.flatten(1, 2), (halves(keys, level.half)[0] * level.key).mT)
        count = chunk // (2 * level.half)
        seen = seen.view(-1, count, 2, level.half, level.half).transpose(1, 2)
        block_of(found, level.half).copy_(seen)
    return found.view(-1, 2 * chunk, chunk), Decays(token, since, until, None)


def _late(both: Tensor, half: int) -> Tensor:
    """Rows of the second halves: [blocks, 2, half, D] of both [N, 2C, D], blocks as `halves`."""
    count, rows, dim = both.shape
    blocks = both.view(count, 2, rows // (4 * half), 2, half, dim)
    return blocks[:, :, :, 1].transpose(1, 2).reshape(-1, 2, half, dim)


def scores_adjoint(
    dscores: Tensor, both: Tensor, decays: Decays | None, dboth: Tensor, dkeys: Tensor
) -> None:
    """Add to dboth [N, 2C, K] and dkeys [N, C, K] (keys as what is seen) what comes through
    `scores`, from dscores [N, 2C, C], which is written."""
    chunk = both.shape[1] // 2
    keys = both[:, chunk:]
    if decays is None or decays.within is not None:
        _mask(dscores, decays)
        torch.baddbmm(dboth, dscores, keys, out=dboth)
        torch.baddbmm(dkeys, dscores.mT, both, out=dkeys)
        return
    keys = keys.contiguous()
    blocks = dscores.view(-1, 2, chunk, chunk)
    diagonal = blocks[:, 0].diagonal(0, 1, 2)[..., None]
    dboth[:, :chunk].addcmul_(diagonal, keys)
    dkeys.addcmul_(diagonal, both[:, :chunk])
    since, until = decays.token.clone(), torch.ones_like(decays.token)
    for level in levels(decays.token, since, until):
        half, count = level.half, chunk // (2 * level.half)
        asked = block_of(blocks, half).transpose(1, 2).reshape(-1, 2 * half, half)
        factor = level.query[:, None]
        rows = (_late(both, half) * factor).flatten(1, 2)
        first = halves(keys, half)[0] * level.key
        back = torch.bmm(asked, first).view(-1, 2, half, both.shape[-1]) * factor
        late = dboth.view(-1, 2, count, 2, half, dboth.shape[-1])[:, :, :, 1]
        late += back.view(-1, count, 2, half, dboth.shape[-1]).transpose(1, 2)
        halves(dkeys, half)[0].add_(torch.bmm(asked.mT, rows) * level.key)
