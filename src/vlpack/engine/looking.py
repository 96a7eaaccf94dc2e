"""The vision encoder's work for the requests of an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from vlpack.decoding.graphs import Array
from vlpack.decoding.images import Unseen
from vlpack.engine.request import Request
from vlpack.preprocess import Prompt


class Looking:
    """Runs the vision encoder on the images of one request after another.

    Args:
        see: function that computes the features of a prompt's images; None if the package takes no images.
        wake: function that is called after the features of a request were computed.
        at_once: whether the encoder runs in the calling thread, which is best for the total throughput: two graphs on
            the same cores take a third longer together than one after the other. Otherwise it runs in a thread of its
            own, so that answers continue meanwhile.
    """

    def __init__(self, see: Callable[[Prompt], Array] | None, wake: Callable[[], None], *, at_once: bool) -> None:
        self._see, self._wake = see, wake
        self._executor: Executor = _AtOnce() if at_once else ThreadPoolExecutor(1, "vlpack-vision")

    def start(self, request: Request, known: int) -> None:
        """Starts the encoder on the images whose tokens the request's slot does not hold.

        Args:
            request: request with images; gets the future of their features.
            known: number of the prompt's first tokens that the slot holds.
        """
        request.unseen = Unseen(request.prompt, request.tokens, known)
        rest = request.unseen.prompt
        if rest is None:
            return

        def look() -> Array:
            assert self._see is not None, "a package that takes images has an encoder"
            started = time.perf_counter()
            features = self._see(rest)
            request.answer.stats.vision_seconds = time.perf_counter() - started
            return features

        request.features = self._executor.submit(look)
        request.features.add_done_callback(lambda _: self._wake())

    def close(self) -> None:
        """Drops the work that has not begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class _AtOnce(Executor):
    """An executor that calls a function when it is submitted, in the same thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        result: Future[Any] = Future()
        try:
            result.set_result(fn(*args, **kwargs))
        except Exception as error:
            result.set_exception(error)
        return result
