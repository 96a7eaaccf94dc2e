"""A page in headless Chromium, controlled over its debugging pipe, which needs neither a driver nor a package."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from chromium import OPTIONS, PROGRAM

LONGEST = 60.0
"""Seconds without a message from the browser after which a call fails, so that a page that hangs ends its test."""


class Browser:
    """A browser with one page.

    Args:
        profile: folder for the browser's profile.

    Attributes:
        console: messages of pages on the console, and errors of the browser, such as blocked scripts.
        requests: addresses that the browser requested.
    """

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        os.set_inheritable(theirs_in, True)
        os.set_inheritable(theirs_out, True)
        options = [*OPTIONS, "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # the browser reads from 3 and writes to 4
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", PROGRAM, *options],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._held, self._session = 0, b"", ""
        self.console: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method of the debugging protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._in], [], [], LONGEST)[0], ("the browser does not answer", self.console)
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._held += data
        text, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        kind, told = found.get("method"), found.get("params", {})
        if kind == "Runtime.consoleAPICalled":
            self.console.append(str([one.get("value") for one in told["args"]]))
        elif kind == "Log.entryAdded":
            self.console.append(told["entry"]["text"] + " " + told["entry"].get("url", ""))
        elif kind == "Runtime.exceptionThrown":
            self.console.append(told["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        return found

    def open(self, url: str, width: int = 1200, height: int = 800, scheme: str = "light") -> None:
        """Opens a page in a window of this size, in pixels, and with this colour scheme."""
        self.size(width, height, scheme)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def size(self, width: int, height: int, scheme: str) -> None:
        """Changes the window's size and colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def value(self, script: str) -> Any:
        """Evaluates an expression in the page and returns its value; waits for promises."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 30) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, (script, self.console)
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Types a text into the focused element."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Presses and releases a key."""
        parameters = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **parameters)
        self.call("Input.dispatchKeyEvent", type="keyUp", **parameters)

    def choose(self, selector: str, *files: Path) -> None:
        """Selects files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, file: Path) -> None:
        """Writes a screenshot of the page to a file."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
