"""Reading valid checkpoints, also from several threads: the bytes equal those that safetensors reads."""

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from vlpack.checkpoint import files as safefile
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.files import sha256_file
from vlpack.errors import CheckpointError

safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")
torch = pytest.importorskip("torch")

CONFIG = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "digits-qwen3-vl"


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(seed)
    return {
        "model.embed.weight": random_.standard_normal((40, 16)).astype(np.float32),
        "model.layers.0.proj.weight": random_.standard_normal((8, 16)).astype(np.float16),
        "model.layers.0.experts": random_.standard_normal((3, 5, 7)).astype(np.float64),
        "model.layers.0.bias": random_.integers(-100, 100, 8).astype(np.int32),
        "model.scale": np.array(2.5, np.float32),
        "model.empty": np.empty((0, 16), np.float32),
    }


def make(folder: Path, tensors: dict[str, np.ndarray], shards: int = 0, config: object = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: array for i, (name, array) in enumerate(tensors.items()) if i % shards == shard}
        safetensors_numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=[0, 3], ids=["single", "sharded"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(make(tmp_path / "model", weights(), shards=request.param)) as opened:
        yield opened


def test_reads_what_safetensors_reads(checkpoint: Checkpoint) -> None:
    stored: dict[str, np.ndarray] = {}
    for file in checkpoint.weight_files():
        stored |= safetensors_numpy.load_file(file)
    assert set(checkpoint.tensors) == set(stored) == set(weights())
    for name, expected in stored.items():
        info = checkpoint.tensors[name]
        got = checkpoint.read(name)
        assert (info.name, info.dtype, info.shape, info.nbytes) == (
            name,
            expected.dtype,
            expected.shape,
            expected.nbytes,
        )
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert bits(got) == bits(expected)
    assert checkpoint.total_bytes() == sum(array.nbytes for array in stored.values())
    assert checkpoint.config == CONFIG
    assert checkpoint.architecture == "Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize(
    "dtype",
    [
        *("bfloat16", "float16", "float32", "float64", "complex64", "bool"),
        *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    ],
)
def test_every_dtype_that_torch_writes(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype, None)
    if kind is None or (not hasattr(np, dtype.rstrip("_")) and not hasattr(ml_dtypes, dtype)):
        pytest.skip(f"this torch or ml_dtypes has no {dtype}")
    raw = torch.arange(48, dtype=torch.uint8) if dtype != "bool" else torch.arange(48, dtype=torch.uint8) % 2
    tensor = raw.view(kind).reshape(2, -1)
    safetensors_torch.save_file({"w": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        array = checkpoint.read("w")
    assert array.dtype == np.dtype(getattr(ml_dtypes, dtype, None) or getattr(np, dtype.replace("bool", "bool_")))
    assert array.shape == tuple(tensor.shape)
    assert bits(array) == bytes(raw.numpy())


def test_bfloat16_values(tmp_path: Path) -> None:
    tensor = torch.randn(5, 9).to(torch.bfloat16)
    safetensors_torch.save_file({"w": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint.read("w").astype(np.float32), tensor.float().numpy())


def test_rows_are_copies_and_not_views(checkpoint: Checkpoint) -> None:
    for name, array in weights().items():
        if array.ndim == 0:
            continue
        for start in range(array.shape[0] + 1):
            for stop in range(start, array.shape[0] + 1):
                got = checkpoint.rows(name, start, stop)
                assert got.shape == array[start:stop].shape
                assert got.dtype == array.dtype
                assert bits(got) == bits(array[start:stop])
                assert got.flags.c_contiguous
                assert got.flags.owndata
                assert got.flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 41), (3, 2), (41, 41), (0, 10**30)])
def test_rows_that_do_not_exist(checkpoint: Checkpoint, start: int, stop: int) -> None:
    with pytest.raises(CheckpointError, match=r"model.embed.weight.*has 40 rows"):
        checkpoint.rows("model.embed.weight", start, stop)


def test_unknown_names_and_scalars(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        CheckpointError, match=r"no tensor 'model.embed.weigth'\.\nThe nearest name is 'model.embed.weight'"
    ):
        checkpoint.read("model.embed.weigth")
    with pytest.raises(CheckpointError, match="is a scalar"):
        checkpoint.rows("model.scale", 0, 1)
    assert checkpoint.read("model.scale") == np.float32(2.5)


def test_rows_read_only_their_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    read_some = safefile.OpenFile._read_some

    def spy(self: safefile.OpenFile, out: memoryview, offset: int) -> int:
        reads.append((offset, len(out)))
        return read_some(self, out, offset)

    with Checkpoint.open(make(tmp_path, weights())) as checkpoint:
        monkeypatch.setattr(safefile.OpenFile, "_read_some", spy)
        info = checkpoint.tensors["model.embed.weight"]
        checkpoint.rows("model.embed.weight", 3, 7)
        checkpoint.rows("model.embed.weight", 5, 5)
    assert reads == [(info.offset + 3 * 16 * 4, 4 * 16 * 4)]


@pytest.mark.parametrize("positional", [True, False], ids=["pread", "seek"])
def test_short_reads_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool) -> None:
    """The kernel may return less than was asked for, and is never asked for more than CHUNK_BYTES at once."""
    monkeypatch.setattr(safefile, "_POSITIONAL", positional and safefile._POSITIONAL)
    monkeypatch.setattr(safefile, "CHUNK_BYTES", 1000)
    read_some, asked = safefile.OpenFile._read_some, []

    def short(self: safefile.OpenFile, out: memoryview, offset: int) -> int:
        asked.append(len(out))
        return read_some(self, out[: max(1, len(out) * 2 // 3)], offset)

    monkeypatch.setattr(safefile.OpenFile, "_read_some", short)
    with Checkpoint.open(make(tmp_path, weights())) as checkpoint:
        for name, array in weights().items():
            assert bits(checkpoint.read(name)) == bits(array)
    assert max(asked) == 1000


@pytest.mark.parametrize("positional", [True, False], ids=["pread", "seek"])
def test_many_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positional: bool) -> None:
    """More shards than open files, and more threads than both: files are closed and opened again while others read."""
    monkeypatch.setattr(safefile, "_POSITIONAL", positional and safefile._POSITIONAL)
    tensors = {f"t{i}": np.full((50, 33), i, np.int32) + np.arange(50, dtype=np.int32)[:, None] for i in range(12)}
    folder = make(tmp_path, tensors, shards=12)
    monkeypatch.setattr(safefile.FilePool.__init__, "__defaults__", (3,))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Checkpoint.open(folder) as checkpoint, ThreadPoolExecutor(8) as threads:

            def job(seed: int) -> bool:
                choose = random.Random(seed)
                for _ in range(60):
                    i, start = choose.randrange(12), choose.randrange(50)
                    stop = choose.randint(start, 50)
                    if bits(checkpoint.rows(f"t{i}", start, stop)) != bits(tensors[f"t{i}"][start:stop]):
                        return False
                return True

            assert all(threads.map(job, range(16)))
            assert len(checkpoint._pool._open) <= 3
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_few_file_descriptors_are_open_and_all_are_closed(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((2, 2), i, np.float32) for i in range(130)}
    folder = make(tmp_path, tensors, shards=130)

    def descriptors() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(tmp_path.resolve()))
            for fd in os.listdir("/proc/self/fd")
        )

    checkpoint = Checkpoint.open(folder)
    assert all(checkpoint.read(name)[0, 0] == i for i, name in enumerate(tensors))
    assert 0 < descriptors() <= safefile.MAX_OPEN_FILES
    checkpoint.close()
    assert descriptors() == 0
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("t0")
    checkpoint.close()  # closing twice is harmless

    (folder / "model-00130-of-00130.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert descriptors() == 0  # although the error's traceback still holds references to the checkpoint
    assert caught.value.hint

    make(folder, tensors, shards=130)
    dropped = Checkpoint.open(folder)
    assert descriptors() > 0
    del dropped
    assert descriptors() == 0


def test_the_pool_keeps_recent_files_and_files_in_use(tmp_path: Path) -> None:
    pool = safefile.FilePool(limit=2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_text(path.name)
        pool.add(path, path)
    for name in "abac":
        with pool.use(tmp_path / name) as file:
            assert file.read(0, 1) == name.encode()
    assert [path.name for path in pool._open] == ["a", "c"]
    with pool.use(paths[0]) as a, pool.use(paths[1]) as b, pool.use(paths[2]) as c:
        assert b"".join(file.read(0, 1) for file in (a, b, c)) == b"abc"
        pool.close()
        assert b"".join(file.read(0, 1) for file in (a, b, c)) == b"abc"
    for file in (a, b, c):
        with pytest.raises(OSError, match="descriptor"):
            file.read(0, 1)


def test_tensors_are_in_the_order_of_their_bytes(checkpoint: Checkpoint) -> None:
    places = [(tensor.file, tensor.offset) for tensor in checkpoint.tensors.values()]
    assert places == sorted(places)
    assert checkpoint.weight_files() == sorted({file for file, _ in places})
    with pytest.raises(TypeError):
        checkpoint.tensors["new"] = None  # type: ignore[index]


def test_the_single_file_wins_over_shards(tmp_path: Path) -> None:
    """The order of preference is that of transformers, which also reads the weights that a config names."""
    make(tmp_path, weights(1), shards=2)
    make(tmp_path, weights(2))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.weight_files() == [tmp_path / "model.safetensors"]
        assert bits(checkpoint.read("model.embed.weight")) == bits(weights(2)["model.embed.weight"])
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "model.safetensors.index.json"}))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert bits(checkpoint.read("model.embed.weight")) == bits(weights(1)["model.embed.weight"])


def test_other_json_files(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / "generation_config.json").write_text('{"top_p": 0.8, "x": Infinity, "a": 1, "a": 2}')
    assert checkpoint.json("generation_config.json") == {"top_p": 0.8, "x": float("inf"), "a": 2}
    assert checkpoint.json("preprocessor_config.json") is None
    (checkpoint.folder / "tokenizer.json").write_text(json.dumps({"vocab": "x" * safefile.MAX_JSON_BYTES}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 100000\d\d bytes"):
        checkpoint.json("tokenizer.json")
    assert checkpoint.json("tokenizer.json", limit=20_000_000) is not None


def test_sha256(checkpoint: Checkpoint) -> None:
    for path in [*checkpoint.weight_files(), checkpoint.folder / "config.json"]:
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert checkpoint.sha256(path) == checkpoint.sha256(path.name) == sha256_file(path) == expected
    (checkpoint.folder / "empty").touch()
    assert checkpoint.sha256("empty") == hashlib.sha256(b"").hexdigest()
    for bad in ["absent", "../config.json", "/etc/passwd"]:
        with pytest.raises(CheckpointError):
            checkpoint.sha256(bad)


def test_sha256_in_pieces(tmp_path: Path) -> None:
    data = os.urandom(9_000_001)
    (tmp_path / "big").write_bytes(data)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the example is not here")
def test_the_shipped_checkpoint() -> None:
    expected = safetensors_torch.load_file(EXAMPLE / "model.safetensors")
    with Checkpoint.open(EXAMPLE) as checkpoint:
        assert checkpoint.architecture == "Qwen3VLForConditionalGeneration"
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            assert bits(checkpoint.read(name)) == bits(tensor.contiguous().view(torch.uint8).numpy())


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs preadv")
def test_a_checkpoint_larger_than_its_memory_stays_on_disk(tmp_path: Path) -> None:
    """A sparse file of 8 GB, which takes no disk space, is opened, and its last rows are read beyond byte 2**32."""
    rows, columns = 1 << 20, 1 << 12
    entry = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + rows * columns * 2)
            file.seek(-2, os.SEEK_END)
            file.write(b"\x80\x3f")  # 1.0
        except OSError:
            pytest.skip("this disk has no sparse files of 8 GB")
    with Checkpoint.open(tmp_path) as checkpoint:
        last = checkpoint.rows("w", rows - 2, rows)
        assert last.shape == (2, columns)
        assert (last[0] == 0).all()
        assert last[1, -1] == 1
