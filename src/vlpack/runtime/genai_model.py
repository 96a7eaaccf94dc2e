"""Checks a package, loads it into onnxruntime-genai, and creates generators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlpack.checkpoint.files import quote
from vlpack.errors import OptionError, PackageError, option
from vlpack.ort.kernels import library
from vlpack.package.loaded_files import LoadedFiles
from vlpack.package.manifest import package_json
from vlpack.package.validate import SECTIONS, check_config, weight_files
from vlpack.runtime.genai import og
from vlpack.runtime.vision import STAND_IN, VisionEncoder, features_port
from vlpack.tasks import GENERATE, check_package_task

RUNTIME_NEEDED = (0, 18)
"""The first version of onnxruntime-genai that passes DeepStack's features from the vision encoder to the decoder."""

SIZES = ("num_hidden_layers", "num_key_value_heads", "head_size")
_INTEGERS = ("context_length", "vocab_size")

RUNTIME = "runtime"
VISION_PROVIDERS = ("cpu", RUNTIME)
"""The places where images can be encoded: vlpack's own onnxruntime session on the CPU, or onnxruntime-genai."""


def open_package(folder: Path) -> LoadedFiles:
    """Opens the files of a package that the runtime can run.

    Raises:
        PackageError: the folder is not a complete package for generating text, or onnxruntime-genai is too old.
    """
    files = LoadedFiles(folder)
    check_package_task(folder, files.manifest, GENERATE)
    version = tuple(int(part) for part in og.__version__.split(".")[:2])
    if version < RUNTIME_NEEDED:
        needed = ".".join(map(str, RUNTIME_NEEDED))
        raise PackageError(
            f"onnxruntime-genai {og.__version__} is too old: packages need {needed} or newer.",
            f"Run pip install -U 'onnxruntime-genai>={needed}'.",
        )
    return files


def read_config(folder: Path, files: Mapping[str, Any], graphs: Mapping[str, str]) -> dict[str, Any]:
    """Reads and checks a package's genai_config.json, which is untrusted.

    Args:
        folder: folder of the package.
        files: ``files`` of the manifest.
        graphs: file name of each part's graph.

    Raises:
        PackageError: the file cannot be read, or asks the runtime for something that a package does not need.
    """
    path = folder / "genai_config.json"
    config = package_json(folder, path.name) if path.name in files else None
    if config is None:
        raise PackageError(f"{folder} has no genai_config.json.", "Build or copy the package again.")
    check_config(path, config, files, graphs)
    try:
        model, eos = config["model"], config["model"]["eos_token_id"]
        sizes = [model[name] for name in _INTEGERS]
        if "decoder" in model:
            sizes += [model["decoder"][name] for name in SIZES]
        if "vision" in model:
            sizes.append(model["vision"]["spatial_merge_size"])
        objects = {"search": config.get("search", {})}
        for name in SECTIONS & model.keys():
            objects |= {f"{name}.inputs": model[name].get("inputs", {}), name: model[name]}
            model[name]["filename"]  # must exist; `check_config` has checked its value
    except (KeyError, TypeError, AttributeError) as error:
        raise PackageError(f"{path} cannot be read: {error!r}.") from None
    for name, value in objects.items():
        if not isinstance(value, dict):
            raise PackageError(f"{path}: '{name}' must be an object, not {quote(value)}.")
    ends = eos if isinstance(eos, list) else [eos]
    known = bool(ends) and all(type(end) is int and 0 <= end < model["vocab_size"] for end in ends)
    if all(type(size) is int and 0 < size < 2**31 for size in sizes) and known:
        return config
    raise PackageError(f"{path} has a {', '.join(_INTEGERS + SIZES)} or eos_token_id of the wrong type or size.")


def vision_encoder(files: LoadedFiles, model: dict[str, Any], threads: int, asked: str | None) -> VisionEncoder | None:
    """The vision encoder in its own onnxruntime session; None if the runtime runs it or the package has none.

    Args:
        files: files of the package; the encoder's files are checked against them when the session is created.
        model: section ``model`` of genai_config.json.
        threads: number of threads of the session.
        asked: one of `VISION_PROVIDERS`, or None for ``cpu`` with packages for the CPU and ``runtime`` with others.

    Raises:
        OptionError: ``asked`` is not one of `VISION_PROVIDERS`, or cannot be used with the package.
        PackageError: the installed vlpack-kernels cannot be used.
    """
    folder = files.folder
    if asked is not None and asked not in VISION_PROVIDERS:
        raise OptionError(
            f"Unknown {option('vision_provider')} {asked!r}.", f"It may be {' or '.join(VISION_PROVIDERS)}."
        )
    if "vision" not in model:
        if asked is not None:
            raise OptionError(f"{option('vision_provider')} has no effect: {folder} has no vision encoder.")
        return None
    on_cpu = files.manifest.get("execution_provider") == "cpu"
    if asked == RUNTIME or (asked is None and not on_cpu):
        return None
    merge = int(model["vision"]["spatial_merge_size"])
    port = features_port(folder / str(model["embedding"]["filename"])) if "embedding" in model else None
    if not on_cpu or port is None or port[0] % merge**2:
        if asked is None:
            return None
        raise OptionError(
            f"{option('vision_provider', asked)} cannot be used with {folder}.",
            f"Leave it out, or give {option('vision_provider', RUNTIME)}.",
        )
    graph = folder / str(model["vision"]["filename"])
    opened = [graph.name, *weight_files(graph)]
    library()  # an unsuitable vlpack-kernels is an error now, and not with the first image
    return VisionEncoder(graph, *port, merge, threads, check=lambda: files.check(opened))


def load_model(
    folder: Path, model: dict[str, Any], threads: int, provider: object, vision: VisionEncoder | None
) -> og.Model:
    """Loads a package into onnxruntime-genai.

    Args:
        folder: folder of the package.
        model: section ``model`` of genai_config.json.
        threads: number of threads of each session but the embedding's, which has one, as the package specifies.
        provider: execution provider of the package, from its manifest.
        vision: vision encoder that replaces the runtime's, if any; it must live as long as the model.

    Raises:
        PackageError: a part is missing, or the runtime cannot load one.
    """
    sections = [name for name in ("decoder", "vision", "embedding") if name in model]
    embeds = "inputs_embeds" in model.get("decoder", {}).get("inputs", {})
    if "decoder" not in model or (embeds and len(sections) < 3):
        raise PackageError(
            f"{folder} holds only {', '.join(sections) or 'no part'} of a model and does not run by itself.",
            f"Build it with {option('part', 'all')}, or with {option('part', 'text')} and without "
            f"{option('extra.exclude_embeds')}.",
        )
    session = {"session_options": {"intra_op_num_threads": threads}}
    overlay: dict[str, dict[str, Any]] = {name: dict(session) for name in sections if name != "embedding"}
    try:
        config = og.Config(str(folder))
        if vision is not None:
            overlay["vision"]["filename"] = STAND_IN
            config.add_model_data(STAND_IN, vision.stand_in)  # not copied: the bytes must outlive the model
        config.overlay(json.dumps({"model": overlay}))
        return og.Model(config)
    except Exception as error:
        raise PackageError(f"The runtime cannot load {folder}: {str(error).strip()[:500]}", _wheel(provider)) from None


def _wheel(provider: object) -> str | None:
    """A hint on which wheel of onnxruntime-genai a package's execution provider needs; None for the CPU."""
    if provider == "cpu":
        return None
    wheels = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-winml"}
    wheel = wheels.get(str(provider), f"a build of onnxruntime-genai with {provider}")
    return (
        f"The package is for {provider}: install {wheel} in place of onnxruntime-genai, or build with "
        f"{option('execution_provider', 'cpu')}."
    )


def make_generator(model: og.Model, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> og.Generator:
    """Creates a generator that has processed a prompt.

    Args:
        model: the model in the runtime.
        arrays: inputs by name, from `Prompt.named_arrays` or `VisionEncoder.runtime_arrays`.
        options: search options of the runtime; ``max_length`` is the number of tokens for which the cache is allocated.
    """
    params = og.GeneratorParams(model)
    params.set_search_options(**options)
    generator = og.Generator(model, params)
    if len(arrays) > 1:
        tensors = og.NamedTensors()
        for name, array in arrays.items():
            tensors[name] = array
        generator.set_inputs(tensors)
    else:
        append(generator, arrays["input_ids"], options)
    return generator


def append(generator: og.Generator, ids: npt.NDArray[np.int32], options: Mapping[str, Any]) -> None:
    """Appends tokens to a generator, in chunks if the search options have a ``chunk_size``.

    The runtime would split them into the same chunks, but could not be interrupted between them.

    Args:
        generator: generator of the runtime.
        ids: token ids ``[1, S]``.
        options: search options of the runtime.
    """
    step = options.get("chunk_size") or ids.size
    for start in range(0, ids.size, step):
        generator.append_tokens(ids[:, start : start + step])
