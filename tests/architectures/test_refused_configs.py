"""Configurations that are refused, because vlpack would silently compute something else than transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import vlpack
from samples import DIGITS, copy_digits, edit_json, seal
from vlpack.builder import build
from vlpack.errors import CheckpointError

VISION_START, VISION_END = 2057, 2058


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copy_digits(tmp_path / "checkpoint")


@pytest.mark.parametrize("value", [False, None, 0])
@pytest.mark.parametrize("keys", [("is_causal",), ("text_config", "is_causal")])
def test_attention_that_is_not_causal(keys: tuple[str, ...], value: Any, source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", *keys, value=value)
    with pytest.raises(CheckpointError, match="is_causal is false, which is not supported"):
        build(source, tmp_path / "package")
    edit_json(source / "config.json", *keys, value=True)
    edit_json(source / "config.json", "use_bidirectional_attention", value=None)
    build(source, tmp_path / "package")


@pytest.mark.parametrize("template", [True, False])
def test_another_token_before_images(template: bool, source: Path, tmp_path: Path) -> None:
    if not template:
        (source / "chat_template.jinja").unlink()
    edit_json(source / "config.json", "vision_start_token_id", value=VISION_END)
    with pytest.raises(CheckpointError, match=r"vision_start_token_id is 2058, but <\|vision_start\|> is 2057"):
        build(source, tmp_path / "package")
    build(source, tmp_path / "text", part="text")  # the text part takes no images


def test_another_token_before_images_in_a_package(tmp_path: Path) -> None:
    package = build(DIGITS, tmp_path / "package", precision="int4").folder
    edit_json(package / "genai_config.json", "model", "vision_start_token_id", value=VISION_END)
    seal(package)
    with pytest.raises(vlpack.VlpackError, match="images would get wrong positions"):
        vlpack.load(package)
    shutil.rmtree(package)
