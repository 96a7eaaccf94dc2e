"""Builds by name: which package of the cache a Hub id and options mean, and what it costs to make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlpack.architectures import read_settings
from vlpack.build_plan import BuildOptions, Place
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.formats import detect
from vlpack.checkpoint.formats.detect import FILES
from vlpack.checkpoint.gguf import check_mmproj
from vlpack.checkpoint.hub import hub_id, is_folder, is_hub_id, resolve
from vlpack.checkpoint.hub_sizes import plan_download
from vlpack.errors import CheckpointError, OptionError, option
from vlpack.export.preflight import planned_size
from vlpack.store.packages import OWN_BITS, Key, Package, find, find_default
from vlpack.tasks import AUTO

_FIRST = ("config.json", "model.safetensors.index.json", *FILES)
"""The files that say how large a package will be, and whether the checkpoint is quantized."""
_BYTES_PER_SECOND = 250_000_000
"""Bytes of a checkpoint that are packed in a second: half of what two cores do (docs/benchmarks.md), for slow disks."""


@dataclass(frozen=True)
class Wanted:
    """A package that is asked for by name.

    Args:
        repository: Hub repository, ``org/name``.
        revision: branch, tag or commit as it was asked for; None for the default branch.
        options: options of the build.
        key_options: those of them that change the package and do not have their defaults.
    """

    repository: str
    revision: str | None
    options: BuildOptions
    key_options: Mapping[str, Any]

    @classmethod
    def read(cls, source: Place, options: BuildOptions) -> Wanted:
        """The package that a source and options mean.

        Raises:
            OptionError: the source is a folder, or an option refers to files, so that no name can stand for the result.
            CheckpointError: the source is not a Hub id.
        """
        if is_folder(source) or not is_hub_id(source):
            check_mmproj(source, options.mmproj)
            if not is_folder(source):
                hub_id(source, options.revision)  # says why it is not a Hub id
            raise OptionError(
                "Where should the package go?",
                f"Give its folder with {option('output')}; only the packages of Hub ids have a place of their own.",
            )
        check_mmproj(source, options.mmproj)
        repository, revision = hub_id(source, options.revision)
        return cls(repository, revision, options, _key_options(options))

    def find(self) -> Package | None:
        """The package that is in the cache already, or None; the network is not used."""
        search = find_default if self.options.own_bits else find
        return search(self.repository, self.revision, str(self.options.precision), self.key_options)

    def resolve(self) -> tuple[Key, Path]:
        """Asks the Hub which commit the revision means now, and downloads config.json into the Hugging Face cache.

        Returns:
            The key of the package, and the folder with config.json.

        Raises:
            CheckpointError: the Hub cannot be asked and the commit is not in the Hugging Face cache, or the checkpoint
                is quantized in a way that vlpack does not read.
        """
        found = resolve(
            self.repository,
            revision=self.revision,
            cache_dir=self.options.cache_dir,
            token=self.options.extra.hf_token,
            patterns=_FIRST,
        )
        if found.commit is None:
            raise CheckpointError(
                f"The commit of {self.repository} in {found.folder} is not known.",
                f"Give the package's folder with {option('output')}.",
            )
        options, key_options = self.options, dict(self.key_options)
        if options.own_bits and detect(settings := Checkpoint.open_settings(found.folder)) is not None:
            options, key_options[OWN_BITS] = options.for_checkpoint(settings), True
        return Key(self.repository, found.commit, str(options.precision), key_options), found.folder


@dataclass(frozen=True)
class Costs:
    """The costs of making a package.

    Args:
        download: bytes to download; 0 if the whole checkpoint is in the Hugging Face cache.
        package: size of the package in bytes, without its tokenizer and settings.
        seconds: approximate duration of the build, without the download.
        cache: the Hugging Face cache.
        address: address of the Hub.
    """

    download: int
    package: int
    seconds: float
    cache: str
    address: str


def costs(wanted: Wanted, key: Key, folder: Path) -> Costs:
    """The costs of making a package, of which only config.json has been downloaded.

    Args:
        wanted: the package that is wanted.
        key: commit and options of the package.
        folder: folder of the checkpoint in the Hugging Face cache, perhaps without weights.

    Raises:
        VlpackError: the checkpoint cannot be built with these options, or the Hub cannot be asked for sizes.
    """
    settings = Checkpoint.open_settings(folder)
    options = wanted.options.for_checkpoint(settings)
    architecture = read_settings(settings, None if options.task == AUTO else options.task)
    package = planned_size(architecture, options.part, options.policy(architecture.precision_facts))
    if Checkpoint.has_weights(folder):
        with Checkpoint.open(folder) as checkpoint:
            weights = checkpoint.total_bytes()
        return Costs(0, package, weights / _BYTES_PER_SECOND, str(folder.parents[2]), "")
    download = plan_download(wanted.repository, key.commit, cache_dir=options.cache_dir, token=options.extra.hf_token)
    return Costs(download.missing, package, download.weights / _BYTES_PER_SECOND, download.cache, download.address)


def _key_options(options: BuildOptions) -> dict[str, Any]:
    """The options that change a package and do not have their defaults, as JSON-like data."""
    if options.lora or options.calibrate not in (None, "self"):
        name = "lora" if options.lora else "calibrate"
        raise OptionError(
            f"A package with {option(name)} has no place of its own in the cache, because the name cannot stand for "
            "the contents of other files.",
            f"Give its folder with {option('output')}.",
        )
    defaults = BuildOptions()
    same_bytes = ("precision", "extra", "revision", "cache_dir", "threads", "lora", "own_bits")
    changed: dict[str, Any] = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name not in same_bytes and value != getattr(defaults, one.name):
            changed[one.name] = value
    for one in fields(options.extra):
        value = getattr(options.extra, one.name)
        if one.name != "hf_token" and value is not None:
            changed[f"extra.{one.name}"] = dict(value) if isinstance(value, Mapping) else value
    return changed
