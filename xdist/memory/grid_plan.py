"""What a call of checkpoint_grid will do, decided from shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from xdist.cost import grid as cost
from xdist.errors import ConfigError, ShapeError
from xdist.memory.grid_chunks import Segment, segments_of
from xdist.memory.grid_layers import Described, describe, problem_of
from xdist.shard import SequenceShard, resolve

_log = logging.getLogger("xdist")


@dataclass
class Plan:
    """Everything about a call that is no tensor."""

    layers: list[Described]
    shard: SequenceShard
    grid: cost.Grid
    groups: list[tuple[int, int]]
    exchanges: bool
    segments: tuple[Segment, ...]
    head: nn.Module | None

    @property
    def modules(self) -> list[nn.Module]:
        """The layers as they were given."""
        return [layer.module for layer in self.layers]


def plan_of(
    layers: Sequence[nn.Module],
    x: Tensor,
    shard: SequenceShard | None,
    given: tuple[int | None, int | None],
    head: nn.Module | None,
    *,
    measured: bool,
) -> Plan:
    """Measured: with what autograd keeps of a cell, for a choice that minimises.

    given: chunk_tokens and group_layers, None where the formula decides. Raises as
    `checkpoint_grid`.
    """
    _check(layers, given, head)
    chunk_tokens, group_layers = given
    shard = resolve(shard, x.shape[1])
    if x.shape[1] != shard.local_length:
        raise ShapeError(
            "checkpoint_grid needs this rank's share of the sequence",
            f"x has {x.shape[1]} tokens, the shard has {shard.local_length}",
            "pass shard.scatter(x)",
        )
    exchanges = shard.group is not None or len(shard.layout.segments(shard.rank)) > 1
    found = describe(layers, x, ordered=exchanges)
    problem = problem_of(found, x, exchanges=exchanges, measured=measured)
    grid = cost.choose(problem, chunk_tokens=chunk_tokens, group_layers=group_layers)
    segments = segments_of(shard.layout, shard.rank, shard.documents, grid.chunk_tokens)
    carried = sum(not chunk.fresh for segment in segments for chunk in segment.chunks)
    grid = cost.grid(problem, grid.chunk_tokens, grid.group_layers, carried=carried)
    whole = [number for number, layer in enumerate(found) if layer.whole]
    _log.debug("checkpoint_grid: %s; layers run on the whole share: %s", grid, whole)
    groups = cost.groups(problem.layers, grid.group_layers)
    if head is not None and (not groups or problem.layers[-1].whole):
        groups.append((len(found), len(found)))
    return Plan(found, shard, grid, groups, exchanges, segments, head)


def _check(
    layers: Sequence[nn.Module], given: tuple[int | None, int | None], head: nn.Module | None
) -> None:
    for module in (*layers, *([] if head is None else [head])):
        if not isinstance(module, nn.Module):
            raise ConfigError(
                "checkpoint_grid takes modules, whose parameters it finds",
                f"got {type(module).__name__}",
                "make it an nn.Module that is called as layer(x, shard), a head as head(y, at)",
            )
    for name, value in zip(("chunk_tokens", "group_layers"), given, strict=True):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1", f"got {value}")
