"""Fixtures of the parity tests: checkpoints, packages and references, each made once per session."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tiny import Tiny, make_checkpoint

if TYPE_CHECKING:
    from parity import Package, Reference

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a program in the background of a shell ignores Control-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Path]:
    """Returns the folder of a tiny checkpoint."""
    made: dict[Tiny, Path] = {}

    def get(tiny: Tiny) -> Path:
        if tiny not in made:
            made[tiny] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tiny)
        return made[tiny]

    return get


@pytest.fixture(scope="session")
def built(checkpoint: Callable[[Tiny], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the folder of a tiny checkpoint's package, by default in fp32; options are strings, as in a shell."""
    from vlpack.builder import build
    from vlpack.options import parse_extra_options

    made: dict[Any, Path] = {}

    def get(tiny: Tiny, *extra: str, precision: str = "fp32", **options: Any) -> Path:
        key = (tiny, extra, precision, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("package") / "package"
            options["extra_options"] = parse_extra_options(extra)
            build(checkpoint(tiny), folder, precision=precision, threads=1, **options)
            made[key] = folder
        return made[key]

    return get


@pytest.fixture(scope="session")
def package(built: Callable[..., Path]) -> Callable[..., Package]:
    """Returns the sessions of a package; arguments as for `built`, but by default with logits of every position."""
    from parity import Package

    made: dict[Path, Package] = {}

    def get(tiny: Tiny, *extra: str, **options: Any) -> Package:
        if not any(option.startswith("prune_lm_head") for option in extra):
            extra = (*extra, "prune_lm_head=false")
        folder = built(tiny, *extra, **options)
        if folder not in made:
            made[folder] = Package(folder)
        return made[folder]

    return get


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[Tiny], Path]) -> Callable[[Tiny], Reference]:
    """Returns the reference: a tiny checkpoint in transformers."""
    import torch

    from parity import Reference

    torch.set_num_threads(1)
    made: dict[Tiny, Reference] = {}

    def get(tiny: Tiny) -> Reference:
        if tiny not in made:
            made[tiny] = Reference(checkpoint(tiny))
        return made[tiny]

    return get
