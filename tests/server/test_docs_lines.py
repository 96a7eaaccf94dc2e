"""The curl commands in docs/serve.md work as the page says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from samples import IMAGES
from server.conftest import Running

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
NAMES = {"qwen3-vl-4b": "tools", "qwen3-vl-embedding-2b": "embedding", "qwen3-vl-reranker-2b": "reranker"}


@pytest.mark.skipif(shutil.which("curl") is None or shutil.which("base64") is None, reason="there is no curl")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.sub(r"\W+", "-", block[26:60]))
def test_a_block_of_lines(block: str, running: Running, tmp_path: Path) -> None:
    Image.open(IMAGES / "00.png").save(tmp_path / "receipt.jpg")
    script = block.replace("http://127.0.0.1:8000", running.url).replace("curl ", "curl --silent --show-error --fail ")
    for name, ours in NAMES.items():
        script = script.replace(name, ours)
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    if "response_format" in block:
        assert set(json.loads(json.loads(done.stdout)["choices"][0]["message"]["content"])) == {"wet"}
    if '"tools"' in block:
        (call,) = json.loads(done.stdout)["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"


def test_there_are_lines() -> None:
    assert len(BLOCKS) == 7
    assert all(f"/v1/{name}" in "".join(BLOCKS) for name in ("chat/completions", "embeddings", "rerank", "models"))
