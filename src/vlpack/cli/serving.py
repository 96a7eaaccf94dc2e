"""The command ``vlpack serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from vlpack.checkpoint.hub import is_folder
from vlpack.cli import console
from vlpack.cli import options as opt
from vlpack.cli.by_name import check_options, is_by_name, package_folder
from vlpack.errors import OptionError


def serve(
    packages: Annotated[
        list[str],
        typer.Argument(
            metavar="PACKAGE…",
            help="Folders of packages, or Hub ids; NAME=FOLDER sets the name of a package in requests.",
        ),
    ],
    precision: opt.Precision = None,
    update: opt.Update = False,
    yes: opt.Yes = False,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; 0.0.0.0 lets other machines connect.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen at; 0 chooses a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="VLPACK_API_KEY",
            show_envvar=False,
            metavar="KEY",
            help="Key that requests must send. The environment variable VLPACK_API_KEY does the same, but other users "
            "of this machine cannot see it.",
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Accept requests without a key although other machines can connect.")
    ] = False,
    slots: Annotated[int, typer.Option("--slots", help="Number of answers that each package generates at a time.")] = 4,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens of prompt and answer together. (default: what the model and half of the memory allow)",
        ),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", help="Largest number of waiting requests per package.")] = 64,
    stall: Annotated[
        float,
        typer.Option(
            "--stall", help="Largest slowdown of running answers while prompts are processed, as a factor; at least 2."
        ),
    ] = 4.0,
    keep_loaded: Annotated[
        int | None, typer.Option("--keep-loaded", help="Number of packages kept in memory. (default: all)")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", help="Largest request, in bytes.")] = 32 * 2**20,
    max_images: Annotated[
        int, typer.Option("--max-images", help="Largest number of images and videos of a request.")
    ] = 32,
    max_image_pixels: Annotated[
        int, typer.Option("--max-image-pixels", help="Largest image before it is resized, in pixels.")
    ] = 64_000_000,
    max_prompt: Annotated[
        int, typer.Option("--max-prompt", help="Largest number of characters in the texts of a request.")
    ] = 1_000_000,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", help="Seconds that running answers may continue after SIGTERM.")
    ] = 30.0,
    allow_private_urls: opt.PrivateUrls = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Origin of a web page that may use the server."),
    ] = None,
    threads: opt.Threads = None,
) -> None:
    """Serve packages over OpenAI's protocol, with a web page for conversations."""
    require()
    from vlpack.server.models import named_folders
    from vlpack.server.run import serve as run_server
    from vlpack.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        no_auth=no_auth,
        slots=slots,
        context=context,
        threads=threads,
        queue=queue,
        stall=stall,
        keep_loaded=keep_loaded,
        max_body=max_body,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        max_prompt=max_prompt,
        drain_seconds=drain_seconds,
        allow_private_urls=allow_private_urls,
        allow_origins=tuple(allow_origin or ()),
    )

    def by_name(text: str) -> Path | None:
        if is_folder(text):
            return None
        if is_by_name(text):
            return package_folder(text, precision, update=update, yes=yes)
        return package_folder(text)

    if not any(map(is_by_name, (text.partition("=")[2] or text for text in packages))):
        check_options(precision, update=update, what=packages[0])
    named = named_folders(packages, by_name)

    def ready(address: str) -> None:
        console.print_plain(
            f"Serving {', '.join(named)} at {address}/v1 (OpenAI's protocol), with a page at {address}/"
        )

    run_server(named, settings, ready)


def require() -> None:
    """Checks that the server's dependencies are installed.

    Raises:
        OptionError: a dependency is missing.
    """
    names = ("fastapi", "uvicorn", "prometheus_client", "llguidance", "pypdfium2")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"vlpack serve needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            "pip install 'vlpack[serve]'",
        )
