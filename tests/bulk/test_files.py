"""Batches over folders with PDFs and videos: a row for every page and for every video."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bulk.conftest import rows_of, write_rows
from preprocess.video_files import pictures, write_video
from samples import ANSWERS, IMAGES, READ
from vlpack import Sampling, VideoOptions, batch
from vlpack.bulk import BatchResult
from vlpack.bulk.pages import AT_ONCE
from vlpack.errors import InputError
from vlpack.preprocess import pdf
from vlpack.runtime.model import Model

Ask = Callable[..., BatchResult]
NAMES = sorted(ANSWERS)


def write_pdf(path: Path, count: int) -> Path:
    """Writes a PDF whose pages are shipped images, in a size that is rendered to as many pixels as they have."""
    pages = [Image.open(IMAGES / name).convert("RGB") for name in NAMES[:count]]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=144)
    return path


def test_pages_of_pdfs(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of several groups are answered as images, and finished pages are not rendered again."""
    pytest.importorskip("pypdfium2")
    data = tmp_path / "data"
    data.mkdir()
    count = AT_ONCE + 2
    write_pdf(data / "b.pdf", count)
    (data / "a.pdf").write_bytes(b"%PDF-1.4 nothing")
    Image.open(IMAGES / "00.png").save(data / "c.png")
    result = ask(data, prompt=READ)
    assert (result.total, result.errors) == (count + 2, 1)
    damaged, *pages, image = rows_of(tmp_path / "out")
    assert damaged["error"] == "a.pdf is damaged, protected, or needs too much memory."
    assert [row["id"] for row in pages] == [f"b.pdf#page={number}" for number in range(1, count + 1)]
    assert [(row["file"], row["page"]) for row in pages] == [("b.pdf", number) for number in range(1, count + 1)]
    good = sum(row["answer"].split() == ANSWERS[name]["read"].split() for row, name in zip(pages, NAMES, strict=False))
    assert good >= count - 2  # JPEG changes the pixels a little
    assert image["file"] == "c.png"
    rendered: list[int] = []
    monkeypatch.setattr("vlpack.bulk.pages.render", lambda data, first, *rest: rendered.append(first))
    assert ask(data, prompt=READ).answered == 0
    assert rendered == []


def test_the_number_of_a_page_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    data = write_pdf(tmp_path / "a.pdf", 3).read_bytes()
    assert pdf.page_count(data) == 3
    assert len(pdf.render(data, 1, 9)) == 2
    assert pdf.render(data, 3, 9) == []
    with pytest.raises(InputError, match="damaged"):
        pdf.page_count(data[:40])


def test_without_pypdfium2(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library is reported before any row is answered, and not as an error of every page."""
    (tmp_path / "data").mkdir()
    write_pdf(tmp_path / "data" / "a.pdf", 1)
    real = subprocess.run

    def without(command: list[str], **options: object) -> subprocess.CompletedProcess[bytes]:
        hide = "import sys; sys.modules['pypdfium2'] = None; import runpy; sys.argv = sys.argv[1:]; "
        script = f"{hide}runpy.run_path(sys.argv[0], run_name='__main__')"
        return real([sys.executable, "-c", script, *command[2:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", without)
    with pytest.raises(pdf.MissingPdfiumError, match=r"PDFs need pypdfium2.*\n.*pip install 'vlpack\[batch\]'"):
        ask(tmp_path / "data", prompt=READ)


def test_videos(tmp_path: Path, digits: Path) -> None:
    """A video in a folder, and one that a row names, get the same answer as the video by itself."""
    data = tmp_path / "data"
    data.mkdir()
    write_video(data / "a.mp4", pictures(8, 64, 96))
    (data / "b.mp4").write_bytes(b"no video")
    options = VideoOptions(num_frames=4)
    common = {"max_tokens": 8, "sampling": Sampling(temperature=0), "threads": 1, "context": 600}
    batch(digits, data, tmp_path / "out", prompt=READ, video_options=options, **common)  # type: ignore[arg-type]
    first, second = rows_of(tmp_path / "out")
    alone = Model(digits, threads=1).generate(
        READ, videos=[data / "a.mp4"], video_options=options, max_tokens=8, sampling=Sampling(temperature=0)
    )
    assert (first["answer"], first["prompt_tokens"]) == (alone.text, alone.stats.prompt_tokens)
    assert first["image_tokens"] == alone.stats.video_tokens > 0
    assert "b.mp4" in second["error"]
    part = {"type": "video", "video": "a.mp4", "num_frames": 4}
    rows = [
        {"video": "a.mp4", "prompt": READ},
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": READ}]}]},
    ]
    path = write_rows(data / "rows.jsonl", rows)
    batch(digits, path, tmp_path / "rows", video_options=options, **common)  # type: ignore[arg-type]
    assert [row["answer"] for row in rows_of(tmp_path / "rows")] == [alone.text] * 2
