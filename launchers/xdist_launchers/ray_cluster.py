"""A connection to a Ray cluster: the only file that imports Ray."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xdist.config_ray import ADDRESS
from xdist.errors import LaunchError
from xdist_launchers.failure import say
from xdist_launchers.ray_plan import Node

FLOOR = (2, 54)  # older versions have holes in the dashboard and no token authentication
_MODE = "RAY_AUTH_MODE"
_GIVEN = "RAY_ADDRESS"
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a job
CONNECT_S = 20.0


def check_environment(address: str, environ: Mapping[str, str], *, insecure: bool) -> None:
    """Refuse, before Ray is loaded, what would be unsafe or ambiguous.

    Raises:
        LaunchError: authentication is switched off, or a cluster is named by RAY_ADDRESS alone.
    """
    mode = environ.get(_MODE, "token").lower()
    if mode != "token" and not insecure:
        raise LaunchError(
            f"{_MODE}={environ[_MODE]} switches Ray's authentication off",
            "whoever reaches the ports of such a cluster runs code as its user",
            f"unset {_MODE}, or give --insecure-ray if the network keeps everybody else out",
        )
    if not address and (given := environ.get(_GIVEN)) and not job_address(environ):
        raise LaunchError(
            f"{_GIVEN}={given} names a cluster, ray.address does not",
            "xdist joins no cluster that the settings do not name",
            f"use it with ray.address={given}, or unset {_GIVEN} for a private cluster",
        )


def job_address(environ: Mapping[str, str]) -> str:
    """HOST:PORT of the cluster that runs this process as a job of its own; "" outside of jobs."""
    given = environ.get(_GIVEN, "")
    return given if _IN_JOB in environ and ADDRESS.fullmatch(given) else ""


def import_ray() -> Any:
    """Ray, once its environment is set: it reads the variables when it is loaded.

    Raises:
        LaunchError: it is not installed, or too old to be safe.
    """
    try:
        import ray
        import ray.util.placement_group
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise LaunchError(
            "Ray is not installed", str(error), "pip install 'xdist-train[ray]'"
        ) from error
    version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version < FLOOR:
        raise LaunchError(
            f"Ray {ray.__version__} is too old",
            f"versions before {FLOOR[0]}.{FLOOR[1]} have known holes (CVE-2026-27482)",
            "pip install --upgrade 'xdist-train[ray]'",
        )
    return ray


@contextlib.contextmanager
def connection(address: str, variables: Mapping[str, str]) -> Iterator[Cluster]:
    """A connection to the cluster at `address`, with `variables` in the environment of Ray.

    Raises:
        LaunchError: nothing answers there, or the token is not that cluster's.
    """
    os.environ.update(variables)
    _check_answers(address)
    ray = import_ray()
    # Workers load xdist as this process did: from a plain copy too.
    paths = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": paths} if paths else None,
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(
            f"the Ray cluster at {address} did not let this driver in",
            lines[0],
            "give the token of that cluster (RAY_AUTH_TOKEN_PATH=FILE), and Ray's version on both "
            "sides must be the same",
        ) from error
    try:
        yield Cluster(ray, address)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would wait a minute for a cluster that is not there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise LaunchError(
            f"no Ray cluster answers at {address}",
            str(error),
            "ray.address is HOST:PORT of the head (`ray start --head --port=PORT` prints it)",
        ) from error


class Cluster:
    """What the driver asks of Ray."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray = ray
        self.address = address

    def nodes(self) -> list[Node]:
        """The nodes that are alive, the head first, then by address."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        found = [
            (
                "node:__internal_head__" not in node["Resources"],
                node["NodeManagerAddress"],
                node["NodeID"],
                node,
            )
            for node in alive
        ]
        return [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                host=node["NodeManagerHostname"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for *_, node in sorted(found, key=lambda entry: entry[:3])
        ]

    def death_of(self, node_id: str) -> str | None:
        """Why a node is not part of the cluster any more; None while it is."""
        for node in self._ray.nodes():
            if node["NodeID"] == node_id:
                return None if node["Alive"] else node.get("DeathReasonMessage", "") or "no reason"
        return "the cluster does not know it"

    def reserve(self, bundles: Sequence[Mapping[str, float]], timeout_s: float) -> Any:
        """A placement group of these bundles; None when it was not there in time."""
        group = self._ray.util.placement_group([dict(b) for b in bundles], strategy="PACK")
        if group.wait(timeout_seconds=timeout_s):
            return group
        self.release(group)
        return None

    def bundle_nodes(self, group: Any) -> list[str]:
        """The node id of each bundle."""
        table = self._ray.util.placement_group_table(group)["bundles_to_node_id"]
        return [table[index] for index in sorted(table)]

    def release(self, group: Any) -> None:
        """Give a placement group back; Ray ends what still runs in it."""
        with contextlib.suppress(Exception):
            self._ray.util.remove_placement_group(group)

    def actor(self, body: type, group: Any, bundle: int, cpus: int, gpus: int) -> Any:
        """An actor of class `body` in a bundle. It is never restarted by Ray."""
        where = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        )
        remote = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(body)
        return remote.options(scheduling_strategy=where).remote()

    def kill(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor, no_restart=True)

    def get(self, reference: Any, timeout_s: float) -> Any:
        """The value of one reference. Raises whatever its task raised, or Ray's own errors."""
        return self._ray.get(reference, timeout=timeout_s)

    def ready(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those that have a value or an error, after at most `timeout_s`; sooner when one has."""
        if not references:
            return []
        return self._ray.wait(list(references), num_returns=1, timeout=timeout_s)[0]

    def task(self, body: Any, *arguments: Any) -> Any:
        """Run a function anywhere in the cluster, on one CPU; a reference to its result."""
        return self._ray.remote(num_cpus=1, max_retries=0)(body).remote(*arguments)

    def is_lost(self, error: Exception) -> bool:
        """Whether an error says that an actor or its node is gone."""
        return isinstance(error, self._ray.exceptions.RayActorError)

    def may_come_back(self, error: Exception) -> bool:
        """Whether an error says only that an actor cannot be reached now."""
        return isinstance(error, self._ray.exceptions.ActorUnavailableError)


def warn_if_insecure(environ: Mapping[str, str]) -> None:
    if environ.get(_MODE, "token").lower() != "token":
        say(
            f"xdist: {_MODE}={environ[_MODE]}: whoever reaches this Ray cluster runs code as its "
            "user"
        )
