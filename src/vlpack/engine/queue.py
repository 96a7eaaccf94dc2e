"""The queue of requests that wait for a slot; its length is limited, and clients take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from vlpack.engine.request import Request
from vlpack.errors import VlpackError, option


class QueueFullError(VlpackError):
    """The queue is full, so the request was refused; it may succeed later."""


class FairQueue:
    """A queue of requests in which clients take turns.

    A client that submits many requests at once delays the requests of other clients by one turn each, not by all of
    its requests.

    Args:
        limit: largest number of waiting requests.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: OrderedDict[object, deque[Request]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def takes(self, count: int) -> bool:
        """Whether there is room for ``count`` more requests."""
        return len(self) + count <= self.limit

    def put(self, requests: Sequence[Request]) -> None:
        """Adds requests to the queue, all or none.

        Raises:
            QueueFullError: there is no room for all of them.
        """
        if not self.takes(len(requests)):
            raise QueueFullError(
                f"{len(self)} requests wait for a slot, and no more than {self.limit} may.",
                f"Ask later, or allow more: {option('queue')}.",
            )
        for request in requests:
            self._clients.setdefault(request.client, deque()).append(request)

    def pop(self) -> Request:
        """Removes and returns the next request; its client's next turn comes after those of all other clients."""
        client, requests = self._clients.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._clients[client] = requests
        return request

    def remove(self, request: Request) -> bool:
        """Removes a request wherever it is in the queue; returns False if it is not in the queue."""
        requests = self._clients.get(request.client, deque())
        if request not in requests:
            return False
        requests.remove(request)
        if not requests:
            del self._clients[request.client]
        return True
