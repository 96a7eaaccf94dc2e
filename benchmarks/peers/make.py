"""Makes the peers of benchmarks/compare.py and benchmarks/build.py: an environment for each, and its model.

Existing results are kept, so that an interrupted run can be continued. At the end it prints the options that
compare.py and build.py take for what was made.

Usage: python benchmarks/peers/make.py CHECKPOINT WORK_FOLDER [--only upstream openvino llama] [--environments]
Needs npm for llama.cpp, and `pip install gguf==0.19.0` beside vlpack for its model. Takes about 12 GB at a 2B's size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = ("upstream", "openvino", "llama")
UPSTREAM = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.32.0",
    "onnx-ir==1.1.0",
    "transformers==5.23.0",
    "torch==2.13.0",
)
# torchvision's operators are found only by the torch that it was built with, so the two belong together
OPENVINO = (
    "openvino-genai==2026.4.1", "transformers==5.0.0", "optimum==2.3.0", "nncf==3.4.0", "huggingface-hub==1.33.0",
    "torch==2.14.1", "torchvision==0.29.1", "requests==2.34.2", "pillow==13.0.0",
)  # fmt: skip
# it requires huggingface-hub below 1.22, but works with the version that is pinned above
OPENVINO_ALONE = ("optimum-intel==2.2.0",)
LLAMA = "node-llama-cpp@3.22.1"


def run(*command: str | Path, folder: Path | None = None) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=folder, check=True)


def python(work: Path, peer: str) -> Path:
    """The Python executable of a peer's environment."""
    return work / f"{peer}-env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(work: Path, peer: str, packages: tuple[str, ...], alone: tuple[str, ...] = ()) -> None:
    """Makes a virtual environment; the packages in ``alone`` are installed without their dependencies."""
    folder = work / f"{peer}-env"
    made = folder / "made"
    if made.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    run(python(work, peer), "-m", "pip", "install", "--quiet", *packages)
    if alone:
        run(python(work, peer), "-m", "pip", "install", "--quiet", "--no-deps", *alone)
    made.touch()


def model(command: list[str | Path], target: Path) -> None:
    """Runs a command that writes a model, if it is missing; an incomplete model never gets the final name."""
    if target.exists():
        return
    part = target.with_name(f"part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    run(*command, part)
    part.rename(target)


def builder(interpreter: str | Path, checkpoint: str | Path, precision: str) -> list[str | Path]:
    """The command of upstream's builder, to which the output folder is appended."""
    return [interpreter, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-p", precision, "-e", "cpu", "-o"]


def export(interpreter: str | Path, checkpoint: str | Path, precision: str) -> list[str | Path]:
    """The command of OpenVINO's export, to which the output folder is appended."""
    tool = Path(interpreter).with_name("optimum-cli")
    task = ("--task", "image-text-to-text", "--weight-format", precision)
    return [tool, "export", "openvino", "-m", checkpoint, *task]


def make(peer: str, checkpoint: Path, work: Path, *, models: bool) -> list[str]:
    """Makes one peer; returns the options of compare.py for it."""
    if peer == "upstream":
        environment(work, peer, UPSTREAM)
        if models:
            model(builder(python(work, peer), checkpoint, "int4"), work / "upstream-int4")
        return ["--upstream", str(work / "upstream-int4"), "--upstream-python", str(python(work, peer))]
    if peer == "openvino":
        environment(work, peer, OPENVINO, OPENVINO_ALONE)
        if models:
            for precision in ("int4", "int8"):
                model(export(python(work, peer), checkpoint, precision), work / f"openvino-{precision}")
        folders = [str(work / f"openvino-{precision}") for precision in ("int4", "int8")]
        return ["--openvino", *folders, "--openvino-python", str(python(work, peer))]
    node = work / "llama-env"
    if not (node / "made").is_file():
        node.mkdir(exist_ok=True)
        (node / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        # the install script would need a compiler or a download; the prebuilt binary is a separate package
        run("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--save-exact", LLAMA, folder=node)
        (node / "made").touch()
    if models:
        script = Path(__file__).with_name("gguf_model.py")
        for kind in ("q4_0", "q8_0"):
            model([sys.executable, script, "--kind", kind, checkpoint], work / f"llama-{kind}.gguf")
    return ["--llama", *(str(work / f"llama-{kind}.gguf") for kind in ("q4_0", "q8_0")), "--node", str(node)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--environments", action="store_true", help="no models: build.py makes and removes its own")
    given = parser.parse_args()
    checkpoint, work = given.checkpoint.resolve(), given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    made, failed = [], []
    for peer in given.only:
        try:
            made += make(peer, checkpoint, work, models=not given.environments)
        except (OSError, subprocess.CalledProcessError) as error:  # the other peers can still be made
            failed.append(f"{peer}: {error}")
    print("\nOptions:", " ".join(made))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
