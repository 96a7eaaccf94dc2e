"""Builds that succeed: equal bytes every time, every kind of checkpoint, memory that does not grow with the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime_genai as og
import pytest

from samples import DIGITS, EMBEDDING, IMAGES, READ, Tensor, content, copy_digits, edit_json, edit_tensors, floats
from vlpack.builder import build
from vlpack.errors import CheckpointError, OptionError
from vlpack.export import weights as datafile
from vlpack.runtime.model import Model
from vlpack.runtime.sampling import Sampling

RANDOM_HASHES = "import sys; from vlpack.builder import build; build(*sys.argv[1:3], threads=int(sys.argv[3]))"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_digits(tmp_path / "checkpoint")


def read(folder: Path, image: str = "00.png") -> str:
    return Model(folder).generate(READ, [IMAGES / image], max_tokens=16, sampling=Sampling(temperature=0)).text


# reproducible builds


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_equal_bytes_with_any_number_of_threads(tmp_path: Path, precision: str) -> None:
    one: dict[str, bytes] = {}
    for threads in (1, 2, 3, 8):
        build(DIGITS, tmp_path / "package", precision=precision, threads=threads, force=threads > 1)
        other = content(tmp_path / "package")
        one = one or other
        assert sorted(one) == sorted(other)
        assert [name for name in one if one[name] != other[name]] == []


def test_equal_bytes_in_other_processes_and_from_another_place(tmp_path: Path) -> None:
    copy_digits(tmp_path / "elsewhere" / DIGITS.name)
    for number, source in enumerate((DIGITS, tmp_path / "elsewhere" / DIGITS.name)):
        environment = {**os.environ, "PYTHONHASHSEED": str(number + 1)}
        command = [sys.executable, "-c", RANDOM_HASHES, str(source), str(tmp_path / str(number)), "2"]
        subprocess.run(command, check=True, env=environment)
    one, two = content(tmp_path / "0"), content(tmp_path / "1")
    assert [name for name in one if one[name] != two.get(name)] == []


def test_no_path_and_no_time_in_the_package(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "package")
    names = [str(folder).encode() for folder in (tmp_path, DIGITS.parents[1], Path.cwd())]
    for file, data in content(tmp_path / "package").items():
        assert [name for name in names if name in data] == [], file
        assert re.findall(rb"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", data) == [] or file.endswith(".data"), file


def test_the_name_of_a_source_given_as_a_relative_path(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source)
    build(".", tmp_path / "package", part="embedding")
    assert json.loads((tmp_path / "package" / "vlpack.json").read_text())["source"]["name"] == "checkpoint"


# kinds of checkpoints


def test_untied(source: Path, tmp_path: Path) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        # the head's rows are shifted by one token, so that using the embedding instead would change the answer
        width = 2 * tensors[EMBEDDING].shape[1]
        data = tensors[EMBEDDING].data
        tensors["lm_head.weight"] = tensors[EMBEDDING]
        tensors[EMBEDDING] = tensors[EMBEDDING]._replace(data=data[:-width] + bytes(width))

    edit_tensors(source, untie)
    edit_json(source / "config.json", "tie_word_embeddings", value=False)
    edit_json(source / "config.json", "text_config", "tie_word_embeddings", value=False)
    build(source, tmp_path / "untied")
    build(DIGITS, tmp_path / "tied")
    assert (tmp_path / "untied" / "embedding.onnx.data").is_file()
    assert not (tmp_path / "tied" / "embedding.onnx.data").exists()
    assert read(tmp_path / "untied") == read(tmp_path / "tied") == "3\n5"
    weights = json.loads((tmp_path / "untied" / "vlpack.json").read_text())["parts"]["decoder.onnx"]["weights"]
    assert "lm_head" in weights
    with pytest.raises(OptionError, match="shared_embeddings=True needs"):
        build(source, tmp_path / "shared", extra_options=options("shared_embeddings=true"))
    notes = build(source, tmp_path / "unshared", extra_options=options("shared_embeddings=false")).notes
    assert any("not tied" in note for note in notes)


def options(*pairs: str) -> Any:
    from vlpack.options import parse_extra_options

    return parse_extra_options(pairs)


def test_a_tied_checkpoint_that_also_contains_its_head(source: Path, tmp_path: Path) -> None:
    # some versions of transformers 4 wrote it; if it differs from the embedding, versions disagree on which is used
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING]}))
    build(source, tmp_path / "package")
    assert read(tmp_path / "package") == "3\n5"
    last_row_zero = 2 * (2176 - 1) * 256

    def differ(tensors: dict[str, Tensor]) -> None:
        head = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = head._replace(data=head.data[:last_row_zero] + bytes(2 * 256))

    edit_tensors(source, differ)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from"):
        build(source, tmp_path / "other")


def test_no_generation_config(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").unlink()
    build(source, tmp_path / "package")
    config = json.loads((tmp_path / "package" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == 2050  # the end token of config.json
    assert config["search"]["do_sample"] is False
    assert not (tmp_path / "package" / "generation_config.json").exists()
    assert read(tmp_path / "package") == "3\n5"


def test_no_tokenizer(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    result = build(source, tmp_path / "package")
    assert any("no tokenizer.json" in note for note in result.notes)


def test_no_tokenizer_config(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").unlink()
    result = build(source, tmp_path / "package")
    assert [note for note in result.notes if "no tokenizer_config.json" in note] == list(result.notes)
    assert len(result.notes) == 1
    with pytest.raises(RuntimeError, match=r"tokenizer_config\.json"):  # the runtime cannot run it, as the note says
        og.Tokenizer(og.Model(str(result.folder)))
    assert read(result.folder) == "3\n5"  # vlpack's own tokenizer does not need the file


def test_no_chat_template(source: Path, tmp_path: Path) -> None:
    (source / "chat_template.jinja").unlink()
    edit_json(source / "tokenizer_config.json", "chat_template", value=None)
    result = build(source, tmp_path / "package")
    assert any("no chat template" in note for note in result.notes)


def test_image_settings_where_transformers_5_keeps_them(source: Path, tmp_path: Path) -> None:
    settings = json.loads((source / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 64 * 64
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    build(source, tmp_path / "package")
    prompt = Model(tmp_path / "package").prompt(READ, [np.zeros((640, 640, 3), np.uint8)])
    assert prompt.image_grid_thw is not None
    assert prompt.image_grid_thw.tolist() == [[1, 4, 4]]


def test_buffers_of_old_checkpoints_are_left_out(source: Path, tmp_path: Path) -> None:
    buffers = {f"model.{place}.inv_freq": Tensor("F32", (4,), bytes(16)) for place in ("language_model.rotary_emb",)}
    buffers |= {"model.visual.rotary_pos_emb.inv_freq": Tensor("F32", (4,), bytes(16))}
    edit_tensors(source, lambda tensors: tensors.update(buffers))
    build(source, tmp_path / "package", part="embedding")


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_other_dtypes_of_weights(source: Path, tmp_path: Path, dtype: str) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            values = floats(tensor).astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype])
            tensors[name] = Tensor(dtype, tensor.shape, values.tobytes())

    edit_tensors(source, convert)
    build(source, tmp_path / "package", precision="fp32")
    assert read(tmp_path / "package") == "3\n5"


def test_a_source_that_is_not_text(tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        source = copy_digits(Path(place))
    except OSError:
        pytest.skip("the disk takes only names in Unicode")
    (source / "tokenizer.json").unlink()  # the tokenizers library accepts only paths in UTF-8
    build(source, tmp_path / "package", part="embedding")
    assert json.loads((tmp_path / "package" / "vlpack.json").read_text())["source"]["name"] == "caf?"


# workers that encode in advance


@pytest.mark.parametrize("items", [1, 50])
def test_items_come_in_order_and_no_further_ahead_than_allowed(items: int) -> None:
    made: list[tuple[int, int]] = []

    def job(number: int) -> Any:
        for item in range(items):
            made.append((number, item))
            yield number, item

    streams = datafile.ahead([partial(job, number) for number in range(12)], threads=3, depth=2)
    for number, stream in enumerate(streams):
        for item, value in enumerate(stream):
            assert value == (number, item)
            time.sleep(0.01 if items == 1 else 0.001)  # a consumer that is slower than the workers
            # with three workers and with one: items in advance must be limited, because weights would fill the memory
            assert max(made)[0] <= number + 3
            # two items in the queue and one in the worker
            assert sum(1 for n, _ in made if n == number) - (item + 1) <= 3
    assert len(made) == 12 * items


def test_leaving_early_stops_the_workers() -> None:
    def endless() -> Any:
        while True:
            yield 0

    before = threading.active_count()
    streams = datafile.ahead([endless, endless], threads=2)
    next(next(streams))
    assert threading.active_count() == before + 2
    streams.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


# memory


TEXT, VISION = "model.language_model", "model.visual"


def write_checkpoint(folder: Path, layers: int, hidden: int = 1024, intermediate: int = 3584) -> Path:
    """Writes a checkpoint with about 29 MB of bfloat16 weights per layer, which repeat the same few values."""
    vision, vocab, head = 64, 4096, 64
    shapes: dict[str, tuple[int, ...]] = {
        f"{TEXT}.embed_tokens.weight": (vocab, hidden),
        f"{TEXT}.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"{TEXT}.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden // 2, hidden) for name in "kv"}
        shapes |= {f"{prefix}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (hidden, intermediate)}
    shapes |= {
        f"{VISION}.patch_embed.proj.weight": (vision, 3, 2, 16, 16),
        f"{VISION}.patch_embed.proj.bias": (vision,),
        f"{VISION}.pos_embed.weight": (64, vision),
    }
    linears = {"attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision)}
    linears |= {"mlp.linear_fc1": (128, vision), "mlp.linear_fc2": (vision, 128)}
    prefixes = {f"{VISION}.blocks.0.": linears}
    prefixes |= {f"{VISION}.merger.": {"linear_fc1": (256, 256), "linear_fc2": (hidden, 256)}}
    for prefix, modules in prefixes.items():
        for name, matrix in modules.items():
            shapes |= {f"{prefix}{name}.weight": matrix, f"{prefix}{name}.bias": matrix[:1]}
    norms = [f"{VISION}.blocks.0.norm1", f"{VISION}.blocks.0.norm2", f"{VISION}.merger.norm"]
    shapes |= {f"{norm}.{kind}": (vision,) for norm in norms for kind in ("weight", "bias")}

    folder.mkdir()
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        offsets = [position, position + 2 * int(np.prod(shape))]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    values = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, len(values)):
            file.write(values[: position - start])
    config = json.loads((DIGITS / "config.json").read_text())
    config |= {name: 7 for name in config if name.endswith("_token_id")} | {"eos_token_id": 7}
    config["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": head,
        "vocab_size": vocab,
    }
    config["text_config"]["rope_parameters"]["mrope_section"] = [12, 10, 10]
    config["vision_config"] |= {
        "depth": 1,
        "hidden_size": vision,
        "num_heads": 4,
        "intermediate_size": 128,
        "num_position_embeddings": 64,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(DIGITS / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


MEASURE = """
import sys
from vlpack.builder import build
print(build(sys.argv[1], sys.argv[2], precision=sys.argv[3], threads=2).peak_memory)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="measured with POSIX' numbers")
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, precision: str) -> None:
    peaks = {}
    for layers in (3, 15):
        source, package = write_checkpoint(tmp_path / "checkpoint", layers), tmp_path / "package"
        command = [sys.executable, "-c", MEASURE, str(source), str(package), precision]
        peaks[layers] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        grown = sum(path.stat().st_size for path in source.iterdir())
        shutil.rmtree(source)
        shutil.rmtree(package)
    assert grown > 400e6
    assert peaks[15] - peaks[3] < 40e6, peaks
