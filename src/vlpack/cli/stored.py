"""The commands for the packages that were built by name: list, rm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from vlpack.cli import console
from vlpack.cli import options as opt
from vlpack.store.changes import remove
from vlpack.store.packages import Package, packages
from vlpack.store.place import packages_folder


def list_packages(as_json: opt.Json = False) -> None:
    """List the packages in the cache, which were built by name; the last used first."""
    found = packages()
    if as_json:
        print(json.dumps([_described(package) for package in found], indent=1))
    elif not found:
        console.print_plain(f"There is no package in {packages_folder()}.")
    else:
        _show(found)


def rm(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME…", help="Names of packages as vlpack list prints them, or Hub ids."),
    ],
) -> None:
    """Remove packages from the cache. Files in the Hugging Face cache and other folders are not touched."""
    for given in names:
        name, size = remove(given)
        console.print_plain(f"Removed {name} ({console.size(size)}).")


def _described(package: Package) -> dict[str, Any]:
    """A package as JSON-like data."""
    return {
        "name": package.name,
        "repository": package.key.repository,
        "commit": package.key.commit,
        "revisions": sorted(package.revisions),
        "precision": package.key.precision,
        "options": dict(package.key.options),
        "bytes": package.bytes,
        "created": _time(package.created).isoformat(timespec="seconds"),
        "last_used": _time(package.used).isoformat(timespec="seconds"),
        "folder": str(package.folder),
    }


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _show(found: Sequence[Package]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "precision", "size", "last use"):
        table.add_column(
            column, justify="right" if column == "size" else "left", overflow="fold", no_wrap=column != "name"
        )
    for package in found:
        used = _time(package.used).astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(console.escape(package.name), package.key.precision, console.size(package.bytes), used)
    console.out.print(table)
    total = console.size(sum(package.bytes for package in found))
    console.print_plain(f"{len(found)} package{'s' * (len(found) > 1)}, {total}, in {packages_folder()}")
