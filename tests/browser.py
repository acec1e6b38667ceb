"""A real Chromium without a window, driven through its debugging pipe: no driver, no port.

Messages are JSON ended by a zero byte, on the browser's descriptors 3 (in) and 4 (out).
"""

import base64
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.patience import PATIENCE_S

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_SECONDS: Final = 30.0


class Page:
    """One tab."""

    def __init__(self, commands: int, replies: int) -> None:
        self._commands = commands
        self._replies = replies
        self._received = b""
        self._number = 0
        self._session = ""
        self.complaints: list[str] = []
        """What the page wrote to its console as an error, and what it threw."""

    def open(self, width: int, height: int) -> None:
        """Make the tab."""
        made = self._call("Target.createTarget", url="about:blank")
        attached = self._call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")
        self.resize(width, height)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size in pixels and the colours that the user prefers."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url: str) -> None:
        """Load a page."""
        answer = self._call("Page.navigate", url=url)
        assert not answer.get("errorText"), answer

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Return the first true value of an expression."""
        ends = time.monotonic() + _SECONDS
        while not (value := self.value(expression)):
            assert time.monotonic() < ends, f"never true: {expression}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            text = "\r" if key == "Enter" and kind == "keyDown" else ""
            codes = {"Enter": 13, "Tab": 9}
            self._call("Input.dispatchKeyEvent", type=kind, key=key, text=text,
                       windowsVirtualKeyCode=codes[key])  # fmt: skip

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of what can be seen, or of the whole page."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._next()
            if heard.get("id") == self._number:
                assert "error" not in heard, heard
                result: dict[str, Any] = heard["result"]
                return result
            self._note(heard)

    def _note(self, heard: dict[str, Any]) -> None:
        method, said = heard.get("method"), heard.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(said["exceptionDetails"].get("text")))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    def _next(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            while b"\0" not in self._received:
                assert selector.select(_SECONDS), "the browser says nothing"
                chunk = os.read(self._replies, 1 << 20)
                assert chunk, "the browser ended"
                self._received += chunk
        first, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


@contextmanager
def browser(directory: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Start Chromium with an empty profile; skips the test where there is none."""
    binary = next(filter(None, map(shutil.which, _NAMES)), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    (theirs_in, commands), (replies, theirs_out) = os.pipe(), os.pipe()
    command = [
        "bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", binary,
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--remote-debugging-pipe", f"--user-data-dir={directory}", "--no-first-run",
        "--disable-background-networking", "--no-proxy-server", "--hide-scrollbars",
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    page = Page(commands, replies)
    try:
        page.open(width, height)
        yield page
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        os.close(commands)
        os.close(replies)
