"""Conversation files are written completely or not at all, and contain every form of message that a chat accepts."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlpack.cli.conversations import read_messages, saved, write_messages
from vlpack.errors import InputError, OptionError
from vlpack.preprocess import load_image, normalize_messages


def test_sources_of_any_form_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", (96, 64)).save(file)
    file.write_bytes(file.read_bytes() + bytes(300))
    monkeypatch.chdir(tmp_path)
    encoded = base64.b64encode(file.read_bytes()).decode()  # longer than a file name can be
    uri = f"data:image/png;base64,{encoded}"
    cases: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"image": uri}, {"url": uri}),
        ({"image": encoded}, {"image": encoded}),
        ({"base64": encoded}, {"base64": encoded}),
        ({"image": "picture.png"}, {"path": str(file)}),
        ({"path": "picture.png"}, {"path": str(file)}),
        ({"path": file}, {"path": str(file)}),
    ]
    for part, stays in cases:
        question = {"role": "user", "content": [{"type": "image", **part}, "What?"]}
        (message,) = json.loads(json.dumps(saved([question])))
        assert message["content"] == [{"type": "image", **stays}, "What?"]
        (source,) = normalize_messages([message]).images
        assert source is not None
        assert load_image(source).size == (96, 64)


def test_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    file, name = tmp_path / "saved.json", "caf\udce9.png"
    messages = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / name)}, "Été?"]}]
    write_messages(file, messages)
    assert read_messages(file) == messages
    for bad in ("a\0b", "x" * 400, "nowhere/saved.json"):
        with pytest.raises(OptionError, match="cannot be written"):
            write_messages(tmp_path / bad, messages)
    assert list(tmp_path.iterdir()) == [file]
    if os.path.exists("/dev/zero"):
        with pytest.raises(InputError, match="is a device"):
            read_messages(Path("/dev/zero"))
