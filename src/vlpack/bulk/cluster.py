"""A Ray cluster: connecting to it, and dividing its cores among actors."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from vlpack.errors import OptionError, VlpackError, option


def require_ray() -> Any:
    """Imports and returns the module ray.

    Raises:
        OptionError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise OptionError("Ray is not installed.", "pip install 'vlpack[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless the user asks for it
    import ray

    return ray


class Cluster:
    """A connection to a Ray cluster; an existing connection is used and not ended. Use it as a context manager.

    Args:
        address: address of the cluster, ``auto`` for the one on this machine, or ``local`` for a new one on this
            machine, which ends with the connection.

    Attributes:
        ray: the module ray.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str) -> None:
        self.ray = require_ray()
        self._address, self._owned = address, False

    def __enter__(self) -> Cluster:
        if self.ray.is_initialized():
            return self
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self._address == "local":
            quiet["include_dashboard"] = False
        try:
            self.ray.init(address=self._address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise OptionError(
                f"There is no Ray cluster at {self._address}: {str(error).strip()[:200]}",
                f"Start one with `ray start --head`, or give {option('ray', 'local')}.",
            ) from None
        self._owned = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self.ray.shutdown()

    def threads(self, given: int | None, count: int) -> int:
        """The number of threads of each actor, which Ray reserves for it.

        Args:
            given: number of threads of all actors together; None for all cores of the cluster.
            count: number of actors.

        Raises:
            OptionError: the cluster has too few cores for the actors.
        """
        cores = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        threads = max(1, (given or sum(cores)) // count)
        threads = min(threads, max(cores, default=0)) if given is None else threads
        while given is None and threads > 1 and sum(core // threads for core in cores) < count:
            threads -= 1
        if threads < 1 or sum(core // threads for core in cores) < count:
            raise OptionError(
                f"{count} actors with {threads} threads do not fit on the cluster, whose machines have {cores} cores.",
                f"Give fewer {option('workers')} or {option('threads')}.",
            )
        return threads

    def cause(self, error: BaseException) -> BaseException:
        """The VlpackError that caused an error of Ray, or one that describes it; others are returned unchanged."""
        if isinstance(error, self.ray.exceptions.RayError):
            inner = getattr(error, "cause", None)
            if isinstance(inner, VlpackError):
                return inner
            return VlpackError(f"Ray failed: {(str(error).strip().splitlines() or [''])[-1][:300]}")
        return error
