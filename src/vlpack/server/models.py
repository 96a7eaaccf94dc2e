"""The packages of a server by name: they are loaded at their first use, and closed if others need the memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from vlpack.engine import Counters, Engine
from vlpack.errors import OptionError
from vlpack.ort.kernels import library
from vlpack.package.manifest import MANIFEST, whole_package
from vlpack.runtime.load import load
from vlpack.runtime.retrieval import Embedder, Reranker
from vlpack.server.errors import ApiError, wrong
from vlpack.server.settings import Settings
from vlpack.tasks import EMBEDDING, GENERATE, RERANKER, manifest_task

_ROUTES = {
    GENERATE: "generates text: ask /v1/chat/completions",
    EMBEDDING: "embeds its inputs: ask /v1/embeddings",
    RERANKER: "scores documents: ask /v1/rerank",
}


@dataclass(eq=False)
class Served:
    """A package of the server, with the name by which requests select it.

    Attributes:
        name: name of the package in requests.
        folder: folder of the package.
        task: task of the package: generate, embedding or reranker.
        created: time when the package was built, in seconds since 1970.
        engine: engine of a package that generates text; None while it is not loaded.
        encoder: loaded embedding model or reranker; None while it is not loaded.
        users: number of requests that use the package now.
        used: time of the last use by `time.monotonic`, in seconds.
        loading: task that loads the package; None if it is not being loaded.
        before: counts of this package's engines that were closed.
    """

    name: str
    folder: Path
    task: str
    created: int
    engine: Engine | None = None
    encoder: Embedder | Reranker | None = None
    users: int = 0
    used: float = 0.0
    loading: asyncio.Task[None] | None = None
    before: Counters = field(default_factory=Counters)

    @property
    def loaded(self) -> bool:
        """Whether the package is in memory."""
        return self.engine is not None or self.encoder is not None

    @property
    def counters(self) -> Counters:
        """Counts of what was computed for this package since the server started."""
        now = self.before if self.engine is None else self.engine.counters
        if now is self.before:
            return now
        return Counters(*(getattr(self.before, one.name) + getattr(now, one.name) for one in fields(Counters)))

    @property
    def chats(self) -> Engine:
        """The engine of a loaded package that generates text."""
        assert self.engine is not None, "it was asked for its task"
        return self.engine


def named_folders(given: list[str], by_name: Callable[[str], Path | None] = lambda text: None) -> dict[str, Path]:
    """Parses packages given as ``FOLDER`` or ``NAME=FOLDER`` into a mapping of names to folders.

    Args:
        given: texts of these forms.
        by_name: function that returns the folder of a package that is given in place of a folder, by a Hub id for
            example, whose name in requests is then that id; None if the text is a folder.

    Raises:
        OptionError: two packages have the same name.
    """
    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or "\\" in name:
            name, folder = "", text
        path = by_name(folder)
        if path is None:
            path = Path(folder).expanduser()
            name = name or path.resolve().name
        name = name or folder
        if name in named:
            raise OptionError(f"Two packages have the name {name!r}.", f"Give one another name: OTHER={folder}")
        named[name] = path
    return named


class Models:
    """All packages of a server, and which of them are in memory.

    Args:
        packages: name → folder of each package; folders are checked now, and packages loaded when first requested.
        settings: settings of the server.

    Raises:
        PackageError: a folder is not a complete package, or the installed vlpack-kernels cannot be used.
    """

    def __init__(self, packages: Mapping[str, Path], settings: Settings) -> None:
        library()  # an unsuitable vlpack-kernels is an error now, and not with the first request
        self._settings = settings
        self.served: dict[str, Served] = {}
        for name, folder in packages.items():
            manifest = whole_package(folder)
            created = int((folder / MANIFEST).stat().st_mtime)
            self.served[name] = Served(name, folder, manifest_task(folder, manifest), created)
        self._changed = asyncio.Condition()
        self._room = settings.keep_loaded or len(self.served)
        self._held: set[str] = set()  # names that are loaded, or about to be

    def named(self, name: str | None, task: str | None = None) -> Served:
        """The package with this name, or without a name the only package for the task.

        Raises:
            ApiError: there is no such package, or it is for another task.
        """
        if name is None:
            fitting = [one for one in self.served.values() if task is None or one.task == task]
            if len(fitting) != 1:
                raise wrong(f"'model' is missing. This server has {self._names()}.", "model")
            return fitting[0]
        if name not in self.served:
            raise ApiError(
                404,
                f"There is no model {name!r}. This server has {self._names()}.",
                param="model",
                code="model_not_found",
            )
        served = self.served[name]
        if task is not None and served.task != task:
            raise wrong(f"{name} {_ROUTES[served.task]}.", "model")
        return served

    def _names(self) -> str:
        return ", ".join(self.served)

    @asynccontextmanager
    async def use(self, served: Served) -> AsyncIterator[Served]:
        """Loads a package if it is not in memory, and keeps it there while the block runs.

        Raises:
            VlpackError: the package cannot be loaded.
        """
        served.users += 1
        try:
            if not served.loaded:
                if served.loading is None:
                    served.loading = asyncio.create_task(self._load(served))
                await asyncio.shield(served.loading)  # a client that disconnects must not stop it for others
            yield served
        finally:
            served.users -= 1
            served.used = time.monotonic()
            async with self._changed:
                self._changed.notify_all()

    async def _load(self, served: Served) -> None:
        async with self._changed:
            while len(self._held) >= self._room:
                idle = [one for one in self.served.values() if one.loaded and not one.users]
                if idle:
                    await self._unload(min(idle, key=lambda one: one.used))
                else:
                    await self._changed.wait()
            self._held.add(served.name)
        try:
            await asyncio.to_thread(self._open, served)
        except BaseException:
            self._held.discard(served.name)
            raise
        finally:
            served.loading = None
            async with self._changed:
                self._changed.notify_all()

    def _open(self, served: Served) -> None:
        settings = self._settings
        if served.task == GENERATE:
            served.engine = Engine(
                served.folder,
                slots=settings.slots,
                context=settings.context,
                threads=settings.threads,
                queue=settings.queue,
                stall=settings.stall,
            )
            return
        encoder = load(served.folder, threads=settings.threads)
        assert isinstance(encoder, (Embedder, Reranker)), "the manifest says so"
        served.encoder = encoder

    async def _unload(self, served: Served) -> None:
        served.before = served.counters
        engine, served.engine, served.encoder = served.engine, None, None
        self._held.discard(served.name)
        if engine is not None:
            await asyncio.to_thread(engine.close)

    async def close(self) -> None:
        """Interrupts all answers and unloads all packages."""
        for served in self.served.values():
            await self._unload(served)
