"""A headless Chromium for the tests: opens a page, waits until it shows what is looked for, reads it, takes its picture."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser", "chromium"]


class Browser:
    """One tab, driven by Chromium's own protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer; events in between are dropped."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url: str, *expected: str, seconds: float = 90.0) -> str:
        """The text of the page at `url`, once it shows all that is expected."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        return self.text(*expected, seconds=seconds)

    def text(self, *expected: str, seconds: float = 90.0) -> str:
        """The text of the page, once it shows all that is expected, whatever white space is in between.

        Raises:
            AssertionError: it does not in time; names what is missing, and the page.
        """
        deadline = time.monotonic() + seconds
        while True:
            shown = str(self.evaluate("document.body ? document.body.innerText : ''") or "")
            words = " ".join(shown.split())
            missing = [part for part in expected if part not in words]
            if not missing:
                return shown
            assert time.monotonic() < deadline, f"the page lacks {missing}; it shows:\n{shown[:3000]}"
            time.sleep(0.25)

    def until(self, condition: str, *, seconds: float = 90.0) -> Any:
        """What a JavaScript expression comes to, once that is true.

        Raises:
            AssertionError: it is not in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            found = self.evaluate(condition)
            if found:
                return found
            assert time.monotonic() < deadline, f"never came true: {condition}"
            time.sleep(0.25)

    def write(self, placeholder: str, text: str) -> None:
        """Write into the field of a placeholder, in place of what is in it."""
        field = f"document.querySelector('input[placeholder={json.dumps(placeholder)}]')"
        self.until(f"{field} && ({field}.focus(), {field}.select(), true)")
        self.call("Input.insertText", text=text)

    def lines_of(self, title: str) -> list[str]:
        """The colours of the lines in the chart of a title, once they are drawn."""
        heading = f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(title)}).pop()"
        # The smallest element around the heading that has lines in it is the chart.
        lines = f"(() => {{ let e = {heading}; while (e && !e.querySelector('path.js-line')) e = e.parentElement;"
        return list(
            self.until(f"{lines} return e && [...e.querySelectorAll('path.js-line')].map(p => p.style.stroke); }})()")
        )

    def click(self, text: str) -> None:
        """Click on the innermost element of exactly this text."""
        self.click_on(
            f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(text)}).pop()"
        )

    def click_on(self, element: str) -> None:
        """Click on the element that a JavaScript expression comes to, once it stays where it is.

        The element gets the click itself: a mouse would miss one that a page, drawn slowly, moves under it.
        """
        where = f"(() => {{ const r = {element}?.getBoundingClientRect(); return r && [r.x, r.y]; }})()"
        at, still = self.until(where), 0
        for _ in range(120):
            time.sleep(0.25)
            before, at = at, self.evaluate(where)
            still = still + 1 if at and at == before else 0
            if still == 4:
                break
        self.until(f"(() => {{ const e = {element}; e?.click(); return !!e; }})()")

    def picture(self, file: Path, *, width: int = 1400, height: int = 900) -> Path:
        """The page as PNG."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(1.0)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return file


@contextlib.contextmanager
def chromium(folder: Path, *, width: int = 1400, height: int = 2400) -> Iterator[Browser]:
    """Start Chromium, or skip the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    client = pytest.importorskip("websockets.sync.client", reason="Chromium is driven over websockets")
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--hide-scrollbars",
    ]
    command += [
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
        "--remote-debugging-port=0",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with client.connect(_address(folder, process), max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Of the first tab, once Chromium has written down which port it listens on."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            port = int((folder / "DevToolsActivePort").read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                return str(next(tab for tab in json.load(answer) if tab["type"] == "page")["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise RuntimeError("Chromium did not start")
