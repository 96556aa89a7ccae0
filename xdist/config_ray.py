"""Checks of [ray]: an address that names a cluster, settings that would have no effect."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from xdist.config_checks import Problem

if TYPE_CHECKING:
    from xdist.config import Config

ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def ray_problems(config: Config) -> list[Problem]:
    """What is wrong with the settings of `xdist launch ray`."""
    ray, found = config.ray, []
    match = ADDRESS.fullmatch(ray.address)
    if ray.address and (match is None or not 0 < int(match[2]) < 65536):
        found.append(
            Problem(
                (("ray", "address"),),
                f'ray.address = "{ray.address}" is not HOST:PORT',
                'xdist joins only the cluster that is named: no "auto", no "ray://"',
                'set ray.address=HOST:PORT of the head, or "" for a private cluster',
            )
        )
    if ray.gpus_per_rank > 1:
        found.append(
            Problem(
                (("ray", "gpus_per_rank"),),
                f"ray.gpus_per_rank = {ray.gpus_per_rank}: a rank uses one card",
                f"{ray.gpus_per_rank - 1} of each rank's cards would be idle",
                "set ray.gpus_per_rank=1, and more ranks with launch.ranks",
            )
        )
    if ray.prepare and not ray.sources:
        found.append(
            Problem(
                (("ray", "prepare"), ("ray", "sources")),
                "ray.prepare = true has nothing to read",
                "ray.sources is empty",
                "name text files and folders in ray.sources, or set ray.prepare=false",
            )
        )
    if ray.sources and not ray.prepare:
        found.append(
            Problem(
                (("ray", "sources"), ("ray", "prepare")),
                "ray.sources has no effect with ray.prepare = false",
                "the store is then only read",
                "set ray.prepare=true, or leave ray.sources out",
            )
        )
    return found
