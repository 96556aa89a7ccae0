"""Data preparation as Ray tasks: the store of `xdist prepare text`, written by many workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xdist.config import Config
from xdist.data.prepare import Prepared, prepare_text
from xdist.errors import XdistError
from xdist_launchers.ray_cluster import Cluster

IN_FLIGHT = 64  # tasks that wait or run; their results are small
WAIT_S = 3600.0  # the longest wait for one part


def prepare(cluster: Cluster, config: Config) -> Prepared:
    """Make data.store from ray.sources, or keep it when it already holds them.

    Sources and store must lie in folders that every node sees.

    Raises:
        DataError: as of `prepare_text`.
    """

    def each(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        waiting: list[Any] = []
        for given in arguments:
            waiting.append(cluster.task(function, *given))
            if len(waiting) >= IN_FLIGHT:
                yield _result(cluster, waiting.pop(0))
        for reference in waiting:
            yield _result(cluster, reference)

    # A worker's current folder is not this one.
    sources = [Path(source).resolve() for source in config.ray.sources]
    return prepare_text(sources, Path(config.data.store).resolve(), existing="keep", each=each)


def _result(cluster: Cluster, reference: Any) -> Any:
    try:
        return cluster.get(reference, WAIT_S)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, XdistError):
            raise cause from None
        raise
