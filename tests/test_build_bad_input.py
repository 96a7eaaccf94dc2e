"""Bad input to a build: a message with a hint, exit code 2, no files left behind, and no other files replaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import samples
from samples import DIGITS, EMBEDDING, QUERY, Tensor, Tensors, copy_digits, edit_json, edit_tensors, poke, vlpack
from vlpack.builder import build
from vlpack.checkpoint.files import sha256_file
from vlpack.errors import OptionError, VlpackError
from vlpack.export import folder as output_module
from vlpack.export import weights as datafile

needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals and locks of POSIX")
Capsys = pytest.CaptureFixture[str]
BEFORE = sha256_file(DIGITS / "model.safetensors")  # copies of the checkpoint are hard links to this file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_digits(tmp_path / "checkpoint")


@pytest.fixture
def refused(tmp_path: Path, capsys: Capsys) -> Callable[..., str]:
    """Runs a build that must fail, to a new place, and returns its error message."""

    def get(source: object, *parts: str, options: tuple[str, ...] = (), place: str = "new/deep/package") -> str:
        before = sorted(tmp_path.rglob("*"))
        done = vlpack(capsys, "build", source, "-o", tmp_path / place, *options)
        assert done.code == 2, done
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert 1 <= len(done.err.splitlines()) <= 2, done.err
        assert "Traceback" not in done.err
        for part in parts:
            assert part in done.err, done.err
        assert sorted(tmp_path.rglob("*")) == before
        return done.err

    return get


def test_the_unaltered_copy_builds(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "new" / "deep" / "package")
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == ["package"]


# the folder and its files


def test_no_such_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    refused(tmp_path / "nowhere", "There is no folder", "nowhere")


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path: Path, capsys: Capsys) -> None:
    done = vlpack(capsys, "build", "-i", "no-such/folder", "-o", tmp_path / "package")
    assert (done.code, "There is no folder" in done.err, "Hub" in done.err.splitlines()[0]) == (2, True, False)


def test_no_config(source: Path, refused: Callable[..., str]) -> None:
    (source / "config.json").unlink()
    refused(source, "config.json")


def test_unknown_architecture(source: Path, refused: Callable[..., str]) -> None:
    edit_json(source / "config.json", "architectures", value=["LlavaForConditionalGeneration"])
    refused(source, "LlavaForConditionalGeneration is not supported", "Supported: ", "Qwen3VLForConditionalGeneration")


@pytest.mark.parametrize("cut", [1, 1000, 20_000_000, 24_093_330])
def test_truncated_weights(source: Path, refused: Callable[..., str], cut: int) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(data[:-cut])
    refused(source, "model.safetensors")


@pytest.mark.parametrize("offsets", [[0, 1024], [1 << 40, (1 << 40) + 1024], [-512, 0], [100, 50]])
def test_offsets_that_overlap_or_leave_the_file(source: Path, refused: Callable[..., str], offsets: list[int]) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.language_model.layers.1.input_layernorm.weight"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(source, "model.safetensors")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors"])
def test_an_index_that_leaves_the_folder(source: Path, refused: Callable[..., str], file: str) -> None:
    (source / "model.safetensors").unlink()
    index = {"weight_map": {EMBEDDING: file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, "not a plain file name")


def test_pickles_only(source: Path, refused: Callable[..., str]) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    refused(source, "pickle", "save_pretrained")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "preprocessor_config.json"])
def test_a_link_out_of_the_folder_is_not_copied(
    source: Path, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    refused(source, name, "leads out of the folder")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "added_tokens.json", "chat_template.jinja", "generation_config.json"]
)
def test_settings_files_that_are_too_large_or_no_files(source: Path, refused: Callable[..., str], name: str) -> None:
    (source / name).unlink(missing_ok=True)
    with open(source / name, "wb") as file:
        file.truncate(1 << 34)  # sparse: 16 GB that must not be copied
    refused(source, name, f"has {1 << 34} bytes")
    if hasattr(os, "mkfifo"):
        (source / name).unlink()
        os.mkfifo(source / name)
        refused(source, name, "not a regular file")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_damaged_tokenizer_or_template(source: Path, refused: Callable[..., str], name: str) -> None:
    (source / name).write_bytes((source / name).read_bytes()[:-40])
    refused(source, name)


def test_image_settings_of_another_model(source: Path, refused: Callable[..., str]) -> None:
    edit_json(source / "preprocessor_config.json", "patch_size", value=14)
    refused(source, "patch_size 14", "16")


def test_no_image_settings(source: Path, refused: Callable[..., str]) -> None:
    (source / "preprocessor_config.json").unlink()
    refused(source, "preprocessor_config.json")


# tensors


def test_missing_tensor(source: Path, refused: Callable[..., str]) -> None:
    edit_tensors(source, lambda tensors: tensors.__delitem__(QUERY))
    refused(source, QUERY, "missing")


def test_missing_tensors_are_reported_before_anything_is_written(source: Path, refused: Callable[..., str]) -> None:
    edit_tensors(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".visual.blocks.3." in name])
    # the whole checkpoint is checked, whatever part is built
    refused(source, "model.visual.blocks.3.", "more are missing", options=("--part", "text"))


def test_extra_tensor(source: Path, refused: Callable[..., str]) -> None:
    extra = "model.language_model.layers.6.mlp.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({extra: Tensor("BF16", (1,), bytes(2))}))
    refused(source, extra, "no place for")


def test_wrong_shape(source: Path, refused: Callable[..., str]) -> None:
    def transpose(tensors: Tensors) -> None:
        tensors[QUERY] = tensors[QUERY]._replace(shape=tensors[QUERY].shape[::-1])

    edit_tensors(source, transpose)
    refused(source, QUERY, "[256, 512]", "[512, 256]")


def test_integer_weights(source: Path, refused: Callable[..., str]) -> None:
    def to_bytes(tensors: Tensors) -> None:
        tensors[QUERY] = Tensor("I8", tensors[QUERY].shape, tensors[QUERY].data[::2])

    edit_tensors(source, to_bytes)
    refused(source, QUERY, "int8", "its config does not say how")


def test_a_quantized_checkpoint_is_reported_as_such(source: Path, refused: Callable[..., str]) -> None:
    edit_tensors(source, lambda tensors: tensors.__delitem__(QUERY))
    edit_json(source / "config.json", "quantization_config", value={"quant_method": "hqq"})
    refused(source, "quantized", "original")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", [QUERY, EMBEDDING, "model.visual.blocks.5.norm2.bias", "model.visual.patch_embed.proj.weight"]
)
def test_values_that_are_not_finite(source: Path, refused: Callable[..., str], name: str, value: float) -> None:
    edit_tensors(source, lambda tensors: poke(tensors, name, 100, value))
    refused(source, f"The tensor {name} holds {value} at row", "damaged")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4"])
def test_values_that_are_not_finite_in_any_precision(source: Path, refused: Callable[..., str], precision: str) -> None:
    edit_tensors(source, lambda tensors: poke(tensors, QUERY, 999, np.nan))
    refused(source, QUERY, "nan at row 3, column 231", options=("-p", precision))


def test_a_value_too_large_for_fp32(source: Path, refused: Callable[..., str]) -> None:
    def widen(tensors: Tensors) -> None:
        values = samples.floats(tensors[QUERY]).astype(np.float64)
        values[1, 2] = 1e300
        tensors[QUERY] = Tensor("F64", tensors[QUERY].shape, values.tobytes())

    edit_tensors(source, widen)
    refused(source, f"The tensor {QUERY} holds 1e+300 at row 1, column 2", options=("-p", "fp32"))


def test_a_value_too_large_for_fp16(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    edit_tensors(source, lambda tensors: poke(tensors, QUERY, 7, 70000.0))
    refused(source, QUERY, "does not fit float16", "--precision fp32", options=("-p", "fp16"))
    build(source, tmp_path / "package", precision="fp32")


# config.json


ABSURD = [0, -1, "4096", 4.5, True, [4], {}, 1 << 40, -(1 << 70)]
SIZES = [
    ("text_config", "hidden_size"),
    ("text_config", "num_hidden_layers"),
    ("text_config", "num_attention_heads"),
    ("text_config", "num_key_value_heads"),
    ("text_config", "head_dim"),
    ("text_config", "intermediate_size"),
    ("text_config", "vocab_size"),
    ("text_config", "max_position_embeddings"),
    ("vision_config", "hidden_size"),
    ("vision_config", "depth"),
    ("vision_config", "num_heads"),
    ("vision_config", "intermediate_size"),
    ("vision_config", "num_position_embeddings"),
    ("vision_config", "out_hidden_size"),
    ("vision_config", "patch_size"),
    ("vision_config", "spatial_merge_size"),
    ("vision_config", "temporal_patch_size"),
]


@pytest.mark.parametrize(("section", "name"), SIZES)
def test_absurd_sizes(source: Path, tmp_path: Path, section: str, name: str) -> None:
    for value in ABSURD:
        edit_json(source / "config.json", section, name, value=value)
        with pytest.raises(VlpackError) as caught:
            build(source, tmp_path / "package")
        # a plausible but wrong size is detected because the weights do not fit it
        assert any(part in caught.value.message for part in (name, "missing", "has the shape")), (value, caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize(
    ("keys", "value", "part"),
    [
        (("text_config", "rms_norm_eps"), -1e-6, "rms_norm_eps"),
        (("text_config", "rms_norm_eps"), "small", "rms_norm_eps"),
        (("text_config", "hidden_act"), "mish", "hidden_act"),
        (("text_config", "hidden_act"), ["silu"], "hidden_act"),
        (("vision_config", "hidden_act"), 3, "hidden_act"),
        (("text_config", "rope_parameters"), [1], "rope_parameters"),
        (("text_config", "rope_parameters", "rope_theta"), 0, "rope_theta"),
        (("text_config", "rope_parameters", "rope_type"), "longrope", "longrope"),
        (("text_config", "rope_parameters", "rope_type"), "llama3", "'factor' is missing"),
        (("text_config", "rope_parameters", "mrope_section"), [24, 20, 21], "mrope_section"),
        (("text_config", "rope_parameters", "mrope_section"), [32, 32], "mrope_section"),
        (("text_config", "rope_parameters", "mrope_section"), [84, -10, -10], "mrope_section"),
        (("text_config", "rope_parameters", "mrope_section"), "24,20,20", "mrope_section"),
        (("vision_config", "deepstack_visual_indexes"), [1, 2, 6], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [1, 2, -1], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [1, 2, 2], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), "1,2,4", "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [1, 2], "no place for tensors"),
        (("vision_config", "out_hidden_size"), 512, "out_hidden_size"),
        (("text_config",), None, "text_config"),
        (("vision_config",), "none", "vision_config"),
        (("tie_word_embeddings",), "yes", "tie_word_embeddings"),
        (("tie_word_embeddings",), False, "lm_head.weight is missing"),
        (("image_token_id",), "<image>", "image_token_id"),
        (("image_token_id",), 99999, "vocabulary"),
        (("image_token_id",), 5, "image_token_id 5"),
        (("text_config", "eos_token_id"), "</s>", None),
    ],
)
def test_bad_values(source: Path, refused: Callable[..., str], keys: tuple[str, ...], value: Any, part: str) -> None:
    edit_json(source / "config.json", *keys, value=value)
    if part is None:  # generation_config.json takes precedence
        (source / "generation_config.json").unlink()
        part = keys[-1]
    refused(source, part)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("eos_token_id", [], "eos_token_id"),
        ("eos_token_id", [2050, 9999], "eos_token_id"),
        ("eos_token_id", [2050, "x"], "eos_token_id"),
        ("temperature", -1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("top_k", -5, "top_k"),
        ("top_p", 1.5, "top_p"),
        ("do_sample", "no", "do_sample"),
    ],
)
def test_bad_generation_settings(source: Path, refused: Callable[..., str], name: str, value: Any, part: str) -> None:
    edit_json(source / "generation_config.json", name, value=value)
    refused(source, part)


# the output


def test_output_that_exists_needs_force(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    build(source, tmp_path / "package", part="embedding")
    before = samples.content(tmp_path / "package")
    refused(source, "exists", "--force", place="package")
    assert samples.content(tmp_path / "package") == before
    build(source, tmp_path / "package", part="vision", force=True)
    assert (tmp_path / "package" / "vision.onnx").is_file()
    assert not (tmp_path / "package" / "embedding.onnx").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "package"]


def test_the_output_is_checked_before_the_source(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "package").write_text("mine")
    refused("some-org/a-download-of-many-gigabytes", "exists", place="package")


@pytest.mark.parametrize("kind", ["file", "folder", "link", "checkpoint", "mixed", "mixed folder", "damaged"])
def test_force_replaces_nothing_but_packages(
    source: Path, tmp_path: Path, refused: Callable[..., str], kind: str
) -> None:
    place = tmp_path / "package"
    if kind == "file":
        place.write_text("mine")
    elif kind == "checkpoint":
        place = source
    elif kind.startswith("mixed") or kind == "damaged":
        build(source, place, part="embedding")
        if kind == "mixed":
            (place / "notes.txt").write_text("mine")
        elif kind == "mixed folder":
            (place / "notes").mkdir()
        else:
            (place / "vlpack.json").write_text("{}")
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        if kind == "link":
            place.symlink_to(folder)
        else:
            place = folder
    refused(source, "exists" if "d" not in kind else "", "--output", options=("--force",), place=place.name)
    assert place.exists()


def test_a_link_to_a_package_is_followed(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "disk" / "package", part="embedding")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "package")
    build(source, tmp_path / "link", part="vision", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "package" / "vision.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "disk", "link"]


def test_an_empty_folder_may_be_the_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    build(source, tmp_path / "package", part="embedding")
    assert (tmp_path / "package" / "vlpack.json").is_file()


def test_an_output_that_appears_during_the_build_is_not_replaced(source: Path, tmp_path: Path) -> None:
    class Taker:
        def start(self, total: int) -> None:
            (tmp_path / "package").mkdir()
            (tmp_path / "package" / "theirs").write_text("mine")

        def advance(self, written: int, path: str) -> None:
            pass

        def say(self, text: str, done: int = 0, total: int = 0) -> None:
            pass

    with pytest.raises(OptionError, match="exists"):
        build(source, tmp_path / "package", part="embedding", progress=Taker())
    assert (tmp_path / "package" / "theirs").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "package"]


@pytest.mark.parametrize("place", ["file/package", "x" * 300, "nul\0l"])
def test_unwritable_output(source: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OptionError, match="Cannot write"):
        build(source, tmp_path / place)


@needs_posix
def test_output_without_permission(source: Path, tmp_path: Path) -> None:
    # not even root can make folders in /proc
    place = Path("/proc/package") if os.geteuid() == 0 else tmp_path / "closed" / "package"
    (tmp_path / "closed").mkdir(mode=0o500)
    if not Path("/proc").is_dir():
        pytest.skip("no folder that root cannot write to")
    with pytest.raises(OptionError, match="Cannot write to"):
        build(source, place)


# the disk


def nothing_left(tmp_path: Path) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_too_little_space_is_reported_before_the_work(
    source: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(datafile.DataFiles, "save", lambda *arguments: pytest.fail("work was begun"))
    refused(source, "Not enough space", "0.02 GB", "0.00 GB")


@pytest.mark.parametrize(("number", "part"), [(errno.ENOSPC, "The disk is full"), (errno.EIO, "Cannot write")])
def test_a_disk_that_fails_in_the_middle(
    source: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, number: int, part: str
) -> None:
    encode = datafile.encode

    def fail(checkpoint: Any, weight: Any, scales: Any, inputs_of: Any) -> Iterator[Any]:
        yield from encode(checkpoint, weight, scales, inputs_of)
        if weight.path.endswith("layers.3.mlp.down_proj"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datafile, "encode", fail)
    refused(source, part, "Nothing was left behind")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("check", [True, False])
def test_a_full_disk(
    source: Path, small_disk: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    if not check:
        monkeypatch.setattr("vlpack.builder.check_space", lambda *arguments: None)
    done = vlpack(capsys, "build", source, "-o", small_disk / "package")
    assert done.code == 2
    assert ("Not enough space" if check else "The disk is full") in done.err
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0])
def test_a_disk_that_becomes_full_at_any_moment(
    source: Path, small_disk: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The disk has room for a part of the package only, so that copies, graphs, weights or the manifest do not fit."""
    monkeypatch.setattr("vlpack.builder.check_space", lambda *arguments: None)
    build(source, small_disk.parent / "whole", precision="int4")
    pages = sum(-(-path.stat().st_size // 4096) for path in (small_disk.parent / "whole").iterdir())
    room = max(1, min(int(share * pages), pages - 1)) * 4096
    subprocess.run(["mount", "-o", f"remount,size={room}", small_disk], check=True)
    done = vlpack(capsys, "build", source, "-o", small_disk / "package", "-p", "int4")
    assert done.code == 2
    assert "The disk is full" in done.err
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", f"remount,size={2 * pages * 4096}", small_disk], check=True)
    build(source, small_disk / "package", precision="int4")
    assert samples.content(small_disk / "package") == samples.content(small_disk.parent / "whole")


def test_a_disk_that_cannot_be_written(source: Path, small_disk: Path, capsys: Capsys) -> None:
    """The disk is mounted read-only, because permissions do not stop root."""
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    build(source, small_disk / "package", part="embedding")
    before = samples.content(small_disk / "package")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for place, more in (("other", []), ("new/deep", []), ("package", ["--force"])):
        done = vlpack(capsys, "build", source, "-o", small_disk / place, *more)
        assert (done.code, done.out) == (2, "")
        assert "Cannot write to" in done.err
        assert "Read-only file system" in done.err
    assert [path.name for path in small_disk.iterdir()] == ["package"]
    assert samples.content(small_disk / "package") == before


# interruptions


def test_keyboard_interrupt(source: Path, tmp_path: Path) -> None:
    class Interrupter:
        def start(self, total: int) -> None:
            pass

        def advance(self, written: int, path: str) -> None:
            if "layers.3" in path:
                raise KeyboardInterrupt

        def say(self, text: str, done: int = 0, total: int = 0) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "package", progress=Interrupter())
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupted_replacement_keeps_the_old_package(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    build(source, tmp_path / "package", part="embedding")
    before = samples.content(tmp_path / "package")
    rename, count = os.rename, 0

    def interrupt(old: Any, new: Any) -> None:
        nonlocal count
        count += 1
        if count == renames:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(
        output_module, "exchange", lambda one, other: False
    )  # as on systems that cannot exchange two names
    monkeypatch.setattr(output_module.os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "package", part="vision", force=True)
    assert samples.content(tmp_path / "package") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "package"]


SLOW_BUILD = """
import sys, time
from vlpack.cli import app as cli
from vlpack.checkpoint import rows as sources
check = sources.check_finite
def slow(*arguments):
    time.sleep(0.05)
    check(*arguments)
sources.check_finite = slow
cli.main(["build", *sys.argv[1:]])
"""


@pytest.fixture
def slow_build(source: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Returns a build in another process that is in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, source, "-o", tmp_path / "package"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size > 10_000 for path in tmp_path.glob(".package.partial-*/*.data")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_build_cleans_up(
    slow_build: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    slow_build.send_signal(number)
    out, err = slow_build.communicate(timeout=20)
    assert (slow_build.returncode, out, err.strip()) == (128 + number, "", "error: Interrupted.")
    assert nothing_left(tmp_path)


@needs_posix
def test_a_killed_build_leaves_no_package_and_the_next_cleans_up(
    slow_build: subprocess.Popen[str], source: Path, tmp_path: Path
) -> None:
    slow_build.kill()
    slow_build.wait()
    assert len(list(tmp_path.glob(".package.partial-*"))) == 1
    assert not (tmp_path / "package").exists()
    other = tmp_path / ".package.partial-notes"  # a folder that no build made
    other.mkdir()
    build(source, tmp_path / "package")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "checkpoint", "package"]


@needs_posix
def test_a_running_build_is_left_alone(slow_build: subprocess.Popen[str], source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "package", part="embedding")
    assert len(list(tmp_path.glob(".package.partial-*"))) == 1
    _, err = slow_build.communicate(timeout=60)
    # the other build finished first, and its package is not replaced
    assert (slow_build.returncode, "exists" in err) == (2, True)
    assert (tmp_path / "package" / "embedding.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "package"]


def test_the_shipped_checkpoint_was_not_touched() -> None:
    assert sha256_file(DIGITS / "model.safetensors") == BEFORE
