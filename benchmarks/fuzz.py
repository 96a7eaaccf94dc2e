"""Feeds vlpack thousands of damaged checkpoints, adapters, packages and images, and counts the results.

Packages are of two kinds: damaged ones that are inspected, and forged ones, whose manifests match, that are run.

Each input is a valid one with a few bytes or JSON values changed. Building, inspecting or decoding it must end in
success or in a VlpackError, within the time and memory allowed, and leave nothing behind. Anything else is printed with
the seed that makes it again, and the exit code is 1.

Usage: python benchmarks/fuzz.py CHECKPOINT [--inputs 10000] [--seed 0] [--only SEED]
"""

from __future__ import annotations

import argparse
import collections
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

import vlpack
from vlpack.builder import build
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import sha256_file
from vlpack.errors import PackageError, VlpackError
from vlpack.inspection import inspect
from vlpack.package.manifest import MANIFEST, _sealed
from vlpack.preprocess import load_image

KINDS = {"checkpoint": 5, "package": 2, "adapter": 2, "image": 1, "forged": 0}
"""The kinds of damaged inputs with their frequencies; forged packages need ``--kind forged``, because they are slow."""
SECONDS = 20
ABOVE = 3 << 30
"""Largest address space that an input may take, in addition to that of the process at the start."""

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    1e308,
    0.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    [],
    [[]],
]
ODD += [{}, {"a": {}}, "\x00", "9" * 400, [1] * 5000, ["model"] * 3, "{% for x in range(10**9) %}{% endfor %}"]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, inserts, repeats or overwrites a few bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) + 1), rng.randint(1, 64)
        match rng.randrange(5):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = rng.randbytes(length)
            case 3:
                changed[place : place + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
            case _:
                del changed[place:]
    return bytes(changed)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Changes, removes or adds a value somewhere in the document."""
    root = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        node: Any = root
        while isinstance(node, (dict, list)) and node:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            inner = node[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                match rng.randrange(4):
                    case 0:
                        del node[key]
                    case 1 if isinstance(node, dict):
                        node[rng.choice(["", "x", "__class__", "../y", str(key) * 9])] = copy.deepcopy(rng.choice(ODD))
                    case 2 if isinstance(inner, (int, float)) and not isinstance(inner, bool):
                        node[key] = inner * rng.choice([0, -1, 2, 10**9, 1e-9, 1e300])
                    case _:
                        node[key] = copy.deepcopy(rng.choice(ODD))
                break
            node = inner
    return json.dumps(root).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a changed header."""
    (length,) = struct.unpack_from("<Q", data)
    header = mutate_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Changes one file of a checkpoint; returns its name."""
    path = rng.choice(sorted(folder.iterdir()))
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        changed = (mutate_header if rng.random() < 0.7 else mutate_bytes)(data, rng)
    elif path.suffix == ".json" and rng.random() < 0.7:
        changed = mutate_json(data, rng)
    else:
        changed = mutate_bytes(data, rng)
    if changed == data:
        changed += b" "
    path.unlink()  # it is a hard link
    path.write_bytes(changed)
    return path.name


def fuzz_checkpoint(source: Path, work: Path, rng: random.Random) -> str:
    folder = work / "checkpoint"
    link(source, folder)
    name = damage_checkpoint(folder, rng)
    build_from(folder, folder, work, precision=rng.choice(["fp32", "int8", "int4"]))
    return name


def build_from(damaged: Path, source: Path, work: Path, **options: Any) -> None:
    """Builds a package and checks that nothing else is left behind; always removes the damaged folder."""
    try:
        build(source, work / "package", threads=1, **options)
    finally:
        shutil.rmtree(damaged)
        left = sorted(path.name for path in work.iterdir())
        if left not in ([], ["package"]):
            raise AssertionError(f"left behind: {left}")
    shutil.rmtree(work / "package")


def fuzz_package(package: Path, work: Path, rng: random.Random) -> str:
    folder = work / "package"
    link(package, folder)
    name = damage_checkpoint(folder, rng)
    try:
        if inspect(folder)["problems"] == []:
            raise AssertionError(f"a change of {name} was not seen")
    finally:
        shutil.rmtree(folder)
    return name


def fuzz_forged(package: Path, work: Path, rng: random.Random) -> str:
    """Loads and asks a package whose text files were changed and whose manifest was made to match.

    This runs in a process of its own, so that a crash of the native runtime is detected. Graphs and weights are not
    changed, because their effects in the runtime are not vlpack's responsibility.
    """
    folder = work / "package"
    link(package, folder)
    try:
        path = rng.choice([path for path in sorted(folder.iterdir()) if ".onnx" not in path.name])
        name, data = path.name, path.read_bytes()
        changed = (mutate_json if path.suffix == ".json" and rng.random() < 0.9 else mutate_bytes)(data, rng)
        path.unlink()  # it is a hard link
        path.write_bytes(changed)
        if name != MANIFEST:
            seal(folder)
        before = sorted(path.name for path in work.rglob("*"))
        outcome = in_a_process(lambda: ask(folder))
        if sorted(path.name for path in work.rglob("*")) != before:
            raise AssertionError(f"asking wrote files after a change of {name}")
        if outcome not in ("", "VlpackError"):
            raise AssertionError(f"{outcome} after a change of {name}")
    finally:
        shutil.rmtree(folder)
    if outcome:
        raise PackageError(f"refused after a change of {name}")
    return name


def ask(folder: Path) -> None:
    os.chdir(folder.parent)
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    model = vlpack.load(folder, threads=1)
    model.generate("Read the digits.", [image], max_tokens=3)


def seal(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(_sealed(manifest), encoding="utf-8")


def in_a_process(work: Callable[[], None]) -> str:
    """Runs ``work`` in a process of its own; returns its end: nothing, VlpackError, another exception or a signal."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            signal.alarm(SECONDS)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # native code would delay a Python handler
            work()
        except VlpackError:
            said = "VlpackError"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:300]
        finally:
            os.write(writer, said.encode(errors="replace"))
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


def fuzz_adapter(source: Path, adapter: Path, work: Path, rng: random.Random) -> str:
    folder = work / "adapter"
    link(adapter, folder)
    name = damage_checkpoint(folder, rng)
    build_from(folder, source, work, precision=rng.choice(["fp32", "int8"]), lora=folder)
    return name


def make_adapter(source: Path, folder: Path) -> None:
    """A LoRA adapter as peft writes it, for two modules of the decoder's first layer."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(0), {}
    with Checkpoint.open(source) as checkpoint:
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            path = f"model.language_model.layers.0.{module}"
            rows, cols = checkpoint.tensors[f"{path}.weight"].shape
            for name, shape in (("lora_A", (2, cols)), ("lora_B", (rows, 2))):
                values = rng.normal(size=shape).astype(np.float32)
                tensors[f"base_model.model.{path}.{name}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def fuzz_image(images: list[bytes], work: Path, rng: random.Random) -> str:
    load_image(mutate_bytes(rng.choice(images), rng))
    return "image"


def link(source: Path, folder: Path) -> None:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).hardlink_to(path)


def pictures() -> list[bytes]:
    made = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        file = io.BytesIO()
        Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(file, kind)
        made.append(file.getvalue())
    return made


def prepare(checkpoint: Path, base: Path) -> None:
    """Makes the valid inputs and checks that they are valid."""
    shutil.copytree(checkpoint, base / "checkpoint")
    build(base / "checkpoint", base / "package", precision="int4", threads=1)
    make_adapter(base / "checkpoint", base / "adapter")
    build(base / "checkpoint", base / "merged", threads=1, lora=base / "adapter")


def too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def show(outcomes: collections.Counter[str], seconds: float, slowest: float) -> None:
    for name, count in sorted(outcomes.items()):
        print(f"{name}: {count}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{outcomes.total()} inputs in {seconds:.0f} s, slowest {slowest:.1f} s, peak memory {peak:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="inputs of this kind alone")
    parser.add_argument("--only", type=int, help="one seed, with its traceback")
    arguments = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    outcomes: collections.Counter[str] = collections.Counter()
    failures, started, slowest = 0, time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(prefix="vlpack-fuzz-") as temporary:
        base, work = Path(temporary) / "base", Path(temporary) / "work"
        prepare(arguments.checkpoint, base)
        work.mkdir()
        images = pictures()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ABOVE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        kinds: dict[str, Callable[[random.Random], str]] = {
            "checkpoint": lambda rng: fuzz_checkpoint(base / "checkpoint", work, rng),
            "package": lambda rng: fuzz_package(base / "package", work, rng),
            "adapter": lambda rng: fuzz_adapter(base / "checkpoint", base / "adapter", work, rng),
            "image": lambda rng: fuzz_image(images, work, rng),
            "forged": lambda rng: fuzz_forged(base / "package", work, rng),
        }
        seeds = (
            [arguments.only] if arguments.only is not None else range(arguments.seed, arguments.seed + arguments.inputs)
        )
        for seed in seeds:
            rng = random.Random(seed)
            kind = arguments.kind or rng.choices(list(kinds), KINDS.values())[0]
            begun = time.monotonic()
            signal.alarm(SECONDS)
            try:
                name = kinds[kind](rng)
                outcomes[f"{kind}: accepted"] += 1
                if arguments.only is not None:
                    print("accepted", name)
            except VlpackError as error:
                outcomes[f"{kind}: {type(error).__name__}"] += 1
                if arguments.only is not None:
                    print(error)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures += 1
                outcomes[f"{kind}: FAILED"] += 1
                print(f"seed {seed}, {kind}: {type(error).__name__}: {str(error)[:200]}", flush=True)
                if arguments.only is not None:
                    traceback.print_exc()
                for left in work.iterdir():
                    shutil.rmtree(left)
            finally:
                signal.alarm(0)
                slowest = max(slowest, time.monotonic() - begun)
    show(outcomes, time.monotonic() - started, slowest)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
