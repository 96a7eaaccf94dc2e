"""Makes docs/chat.png: a picture of `vlpack chat` in a terminal, beside the images that the conversation is about.

The package is built from the checkpoint that ships with vlpack, and the picture shows the program's real output:
pexpect types the input, pyte emulates the terminal, and chromium draws the terminal's screen.

Usage: python docs/make_picture.py     (needs pip install '.[test]' and chromium)
"""

from __future__ import annotations

import base64
import html
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pyte

import vlpack
from vlpack.shipped import examples_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chromium import OPTIONS, PROGRAM

COLUMNS, LINES = 64, 20
FIRST, SECOND = "01.png", "23.png"
TYPED = ("Read the digits.", "/reset", f"/image {SECOND}", "Read the digits.")
"""Input lines. /reset is needed because the checkpoint was trained on single questions and not on conversations."""
COLORS = {"default": "#cdd6f4", "green": "#a6e3a1", "brown": "#f9e2af", "cyan": "#89dceb", "red": "#f38ba8"}
PAGE = """<!doctype html><meta charset="utf-8"><style>
* {{ margin: 0; box-sizing: border-box }}
body {{ width: 1000px; height: 400px; background: #1e1e2e; color: #cdd6f4; display: flex; padding: 24px; gap: 28px }}
pre {{ font: 18px/24px "DejaVu Sans Mono", monospace; width: 710px; white-space: pre }}
figure {{ font: 14px "DejaVu Sans Mono", monospace; color: #9399b2; margin-bottom: 22px }}
img {{ display: block; max-height: 140px; max-width: 220px; margin-bottom: 6px; border-radius: 4px }}
</style><pre>{screen}</pre><div>{images}</div>"""


class Terminal:
    """A program that runs in a pseudo-terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "TERM": "xterm-256color"}
        self.child = pexpect.spawn(
            command[0], command[1:], dimensions=(LINES, COLUMNS), cwd=str(folder), env=environment, timeout=60
        )
        self.screen = pyte.Screen(COLUMNS, LINES)
        self.screen.write_process_input = self.child.send  # answers the program's question for the cursor's position
        self.stream = pyte.ByteStream(self.screen)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(self.text)
            try:
                self.stream.feed(self.child.read_nonblocking(1 << 16, timeout=0.2))
            except pexpect.TIMEOUT:
                continue

    def say(self, line: str) -> None:
        """Types a line and waits until the program is ready for the next one."""
        before = self.text
        self.child.send(line + "\r")
        self.until(lambda: self.text.endswith("\n>") and self.text != before and line in self.text)

    def as_html(self, head: list[str]) -> str:
        """The screen with colors as HTML, below the lines that precede the program's output."""
        lines = [f'<span style="color:{COLORS["green"]}">$</span> {html.escape(line)}' for line in head]
        for row in range(self.text.count("\n") + 1):
            line = ""
            for column in range(COLUMNS):
                cell = self.screen.buffer[row][column]
                color = COLORS.get(cell.fg, COLORS["default"])
                weight = ";font-weight:bold" if cell.bold else ""
                line += f'<span style="color:{color}{weight}">{html.escape(cell.data)}</span>'
            lines.append(line)
        return "\n".join(lines)


def main() -> None:
    examples = examples_folder()
    if PROGRAM is None:
        sys.exit("error: chromium is not installed.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for image in (FIRST, SECOND):
            shutil.copyfile(examples / "digits-images" / image, folder / image)
        vlpack.build(examples / "digits-qwen3-vl", folder / "digits", precision="int8")
        terminal = Terminal([sys.executable, "-m", "vlpack", "chat", "digits", "--image", FIRST], folder)
        terminal.until(lambda: terminal.text.endswith("\n>"))
        for line in TYPED:
            terminal.say(line)
        images = "".join(
            f'<figure><img src="data:image/png;base64,{base64.b64encode((folder / image).read_bytes()).decode()}">'
            f"{image}</figure>"
            for image in (FIRST, SECOND)
        )
        head = [f"vlpack chat digits --image {FIRST}"]
        page = folder / "page.html"
        page.write_text(PAGE.format(screen=terminal.as_html(head), images=images), encoding="utf-8")
        terminal.child.close(force=True)
        output = Path(__file__).with_name("chat.png")
        command = [PROGRAM, *OPTIONS, "--force-device-scale-factor=2", "--window-size=1000,400"]
        subprocess.run(
            [*command, f"--screenshot={output}", page.as_uri()],
            check=True,
            capture_output=True,
        )
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
