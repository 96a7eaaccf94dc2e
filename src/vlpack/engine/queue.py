"""Requests that wait for a slot: so many at most, and each client in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from vlpack.engine.request import Request
from vlpack.errors import VlpackError, option


class QueueFullError(VlpackError):
    """As many requests wait as may wait; one that comes later may be taken."""


class FairQueue:
    """Waiting requests. Clients take turns, so that one that asks much at once does not make the others wait for all.

    Args:
        limit: how many requests may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: OrderedDict[object, deque[Request]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def takes(self, count: int) -> bool:
        """Whether so many more may wait."""
        return len(self) + count <= self.limit

    def put(self, requests: Sequence[Request]) -> None:
        """Let requests wait.

        Raises:
            QueueFullError: so many more than may wait; then none of them does.
        """
        if not self.takes(len(requests)):
            raise QueueFullError(
                f"{len(self)} requests wait for a slot, and no more than {self.limit} may.",
                f"Ask later, or allow more: {option('queue')}.",
            )
        for request in requests:
            self._clients.setdefault(request.client, deque()).append(request)

    def pop(self) -> Request:
        """Take the request whose turn it is; its client's others wait until every other client had a turn."""
        client, requests = self._clients.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._clients[client] = requests
        return request

    def remove(self, request: Request) -> bool:
        """Take a request out of its turn; whether it waited."""
        requests = self._clients.get(request.client, deque())
        if request not in requests:
            return False
        requests.remove(request)
        if not requests:
            del self._clients[request.client]
        return True
