"""The line with the current step and its seconds is shown only in a terminal, and removed when the step is finished."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samples import DIGITS, IMAGES, READ
from vlpack.builder import build
from vlpack.cli.waiting import line

if sys.platform == "win32":
    pytest.skip("a terminal of Unix", allow_module_level=True)

import pexpect
import pyte

# a program that sleeps while it holds Python's global interpreter lock, as the runtime does while it works
HOLD = "import ctypes; ctypes.PyDLL(None).sleep({})"
SLOW = """
import sys
from vlpack.cli import app
from vlpack.runtime.model import Model
begin, load = Model.begin, Model.__init__
def hold():
    import ctypes
    ctypes.PyDLL(None).sleep(2)
def slow_load(self, *arguments, **options):
    hold()
    load(self, *arguments, **options)
def slow_begin(self, *arguments, **options):
    hold()
    return begin(self, *arguments, **options)
Model.begin, Model.__init__ = slow_begin, slow_load
app.main()
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("package") / "digits", precision="int8").folder


def in_a_terminal(program: str, *arguments: object) -> tuple[str, list[str], int]:
    """Runs a program in a pseudo-terminal; returns its output, the final content of the screen, and the exit code."""
    child = pexpect.spawn(
        sys.executable, ["-c", program, *map(str, arguments)], dimensions=(20, 90), timeout=120, encoding="utf-8"
    )
    written = child.read()
    child.close()
    screen = pyte.Screen(90, 20)
    pyte.Stream(screen).feed(written)
    return written, [shown.rstrip() for shown in screen.display if shown.strip()], child.exitstatus


def test_seconds_advance_while_the_lock_is_held() -> None:
    written, seen, code = in_a_terminal(
        "from vlpack.cli import console\nwith console.waiting('loading a package'):\n"
        f"    {HOLD.format(3)}\nprint('done')"
    )
    assert code == 0
    for seconds in (1, 2):
        assert f"loading a package ... {seconds} s" in written
    assert seen == ["done"]


def test_run_shows_its_steps(package: Path) -> None:
    image = IMAGES / "02.png"
    written, seen, code = in_a_terminal(SLOW, "run", package, "--image", image, "--temperature", "0", READ)
    assert code == 0
    assert re.search(r"loading \S+.* \.\.\. 1 s", written)
    assert re.search(r"looking at 1 image, reading \d+ tokens \.\.\. 1 s", written)
    assert not any("..." in shown for shown in seen)
    written, _, _ = in_a_terminal(SLOW, "run", package, "--temperature", "0", "Hello")
    assert re.search(r"\Wreading \d+ tokens \.\.\. 1 s", written)


def test_nothing_is_shown_without_a_terminal(package: Path) -> None:
    command = [sys.executable, "-c", SLOW, "run", str(package), "--max-tokens", "1", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "..." not in done.stderr


def test_a_short_wait_shows_nothing() -> None:
    written, _, _ = in_a_terminal(
        "from vlpack.cli import console\nwith console.waiting('loading'):\n    pass\nprint('done')"
    )
    assert "loading" not in written


def test_control_c_and_a_killed_parent_end_it() -> None:
    program = (
        f"import os, signal\nfrom vlpack.cli import console\nwith console.waiting('x'):\n    {HOLD.format(1)}\n    "
    )
    written, seen, _ = in_a_terminal(program + "os.kill(0, signal.SIGINT); import time; time.sleep(60)")
    assert "KeyboardInterrupt" in written
    assert not any(shown.startswith("x ...") for shown in seen)
    child = pexpect.spawn(sys.executable, ["-c", program + "import time; time.sleep(60)"], timeout=60)
    child.expect("x \\.\\.\\. 1 s")
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(child.pid)], capture_output=True, text=True, check=True
    )
    drawing = int(found.stdout.split()[0])
    child.kill(9)
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{drawing}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{drawing}")
    child.close(force=True)


def test_a_line_fits_the_terminal() -> None:
    assert line("loading", 3.4, 80) == "\r" + "loading ... 3 s".ljust(79) + "\r"
    assert line("loading", 3.4, 5) == "\rload\r"
