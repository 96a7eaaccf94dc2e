"""Measures llama.cpp's quantized models against the fp32 model, with and without an importance matrix.

Takes the folder that `python benchmarks/quality.py WORK_FOLDER --prepare` fills. llama.cpp's own tools quantize a GGUF
file of the fp32 weights; the importance matrix is computed with the calibration texts, in pieces of 256 tokens. Logits
are computed for the same token ids by a small program that uses its library (llama_tools). The tools are built once
from the source in PyPI's llama-cpp-python. The fp32 file is measured too, to detect mistakes in writing it.

The fp32 file and the importance matrix stay in the folder for the next run.

Usage: python benchmarks/peers/quality_llama.py WORK_FOLDER [--output quality-llama.json] [--models mild outliers]
       [--types Q8_0 Q4_0 ...] [--source FOLDER] [--threads N]
Needs cmake and a C++ compiler, and `pip install gguf==0.19.0` beside vlpack.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from quality_scores import CALIBRATION, MODELS, TOKENS, Array, Row, save, score

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS")
TOOLS = ("llama-quantize", "llama-imatrix", "llama-tokenize", "llama-logits")
PRE_TOKENIZER = "smollm"
PIECE = 256
"""Number of tokens with which the importance matrix is computed at a time."""
WRONG = 1e-3
"""KL divergence of the fp32 file above which it is not the same model."""


def run(*command: str | Path) -> str:
    """The standard output of a command.

    Raises:
        SystemExit: the command failed.
    """
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def tools(work: Path, source: Path | None, threads: int) -> Path:
    """The folder of llama.cpp's tools, built if they are not there."""
    build = work / "llama-build"
    folder = build / "bin"
    if all((folder / tool).exists() for tool in TOOLS):
        return folder
    if source is None:
        source = work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        if not source.is_dir():
            pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--dest", work)
            run(*pip, f"{PACKAGE}=={VERSION}")
            with tarfile.open(work / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
                archive.extractall(work, filter="data")
    own = Path(__file__).parent / "llama_tools"
    run("cmake", "-S", own, "-B", build, "-DCMAKE_BUILD_TYPE=Release", f"-DLLAMA_SOURCE={source.resolve()}")
    run("cmake", "--build", build, "-j", str(threads), "--target", *TOOLS)
    return folder


def check_tokenizer(folder: Path, model: Path, calibration: Path) -> int:
    """The number of tokens that llama.cpp finds in the calibration texts.

    Raises:
        SystemExit: they differ from those of the checkpoint's tokenizer.
    """
    from vlpack.preprocess.tokenizer import Tokenizer

    text = calibration.read_text(encoding="utf-8")
    tokenize = folder / "llama-tokenize"
    found = json.loads(run(tokenize, "-m", model, "-f", calibration, "--ids", "--no-bos", "--log-disable"))
    wanted = Tokenizer.from_folder(model.parent / model.name.partition("-")[0]).encode(text)
    if found != wanted:
        sys.exit("llama.cpp splits the calibration texts into other tokens than the checkpoint's tokenizer.")
    return len(wanted)


def bits(path: Path) -> tuple[float, float]:
    """Bits per weight of the decoder's matrices and of the head in a GGUF file."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    decoder = [tensor for name, tensor in tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    total = 8 * sum(int(tensor.n_bytes) for tensor in decoder) / sum(int(tensor.n_elements) for tensor in decoder)
    return total, 8 * int(head.n_bytes) / int(head.n_elements)


def logits(folder: Path, model: Path, ids: Array, threads: int) -> Iterator[Array]:
    """Logits of each row of ``ids [texts, tokens]``, float32 [tokens, vocabulary]."""
    given, found = model.with_suffix(".ids"), model.with_suffix(".logits")
    ids.astype(np.int32).tofile(given)
    run(folder / "llama-logits", model, given, *map(str, (*ids.shape, threads)), found)
    yield from np.memmap(found, np.float32, "r").reshape(*ids.shape, -1)
    given.unlink()
    found.unlink()


def measure(work: Path, folder: Path, model: str, kinds: list[str], threads: int) -> Iterator[Row]:
    """Yields the row of the fp32 file, then a row for each type without and with the importance matrix."""
    from gguf_model import write

    ids, version = np.load(work / TOKENS), f"llama.cpp in {PACKAGE} {VERSION}"
    plain = work / f"{model}-F32.gguf"
    if not plain.exists():
        write(work / model, plain, kind="f32", pre_tokenizer=PRE_TOKENIZER)
    row = score(work, model, "llama.cpp F32", logits(folder, plain, ids, threads), *bits(plain), version)
    if row.kl > WRONG:
        sys.exit(f"The fp32 GGUF file has a KL of {row.kl:.2g}, so it is not the same model.")
    yield row
    texts = work / "calibration.txt"
    texts.write_text("\n".join(json.loads((work / CALIBRATION).read_text(encoding="utf-8"))["texts"]), encoding="utf-8")
    print(f"{model}: importance matrix of {check_tokenizer(folder, plain, texts)} tokens", flush=True)
    matrix = work / f"{model}-imatrix.gguf"
    options = ("-c", str(PIECE), "-t", str(threads), "--parse-special", "--no-ppl")
    if not matrix.exists():
        run(folder / "llama-imatrix", "-m", plain, "-f", texts, "-o", matrix, *options)
    for kind in kinds:
        for importance in ([], *([["--imatrix", matrix]] if kind != "Q8_0" else [])):  # Q8_0 does not use it
            quantized = work / f"{model}-quantized.gguf"
            run(folder / "llama-quantize", *importance, plain, quantized, kind, str(threads))
            name = f"llama.cpp {kind}{', imatrix' if importance else ''}"
            yield score(work, model, name, logits(folder, quantized, ids, threads), *bits(quantized), version)
            quantized.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--source", type=Path, help="llama.cpp's, instead of what PyPI has")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder = tools(given.work, given.source, given.threads)
    for model in given.models:
        for row in measure(given.work, folder, model, given.types, given.threads):
            if given.output:
                save(given.output, [row])


if __name__ == "__main__":
    main()
