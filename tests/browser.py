"""Drives headless Chromium through its debugging pipe: real clicks, drags and keys, and what the page complained of.

Two pipes and JSON; no driver program and no further package. Left out: other browsers, and anything no test here needs.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
TIMEOUT_SECONDS = 60.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4. Both pipes are moved out of the way
# first: they may lie on 3 or 4 themselves, the wrong way round.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""
_CODES = {
    "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36,
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


class Browser:
    """One Chromium process; `call` sends a command of the DevTools protocol and returns its result."""

    def __init__(self, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [sys.executable, "-c", _START, str(to_read), str(to_write), str(CHROMIUM), *_FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._sent = 0
        self._tabs: dict[str, Tab] = {}

    def open(self, url: str, *, width: int = 1280, height: int = 1000) -> Tab:
        """A new tab with `url`, loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        tab.call("Page.navigate", {"url": url})
        tab.wait_for(lambda: tab.loaded, "the page to load")
        return tab

    def call(self, method: str, params: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params or {}}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; events are also kept by the tab they concern."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium did not answer in time")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise ConnectionError("Chromium closed its debugging pipe")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message and (tab := self._tabs.get(message.get("sessionId", ""))):
            tab.keep(message["method"], message["params"])
        return message

    def close(self) -> None:
        try:
            self.call("Browser.close")
        except (OSError, RuntimeError):
            self._process.kill()
        self._process.wait(timeout=TIMEOUT_SECONDS)
        os.close(self._read)
        os.close(self._write)


class Tab:
    """One page. `complaints` holds console messages, uncaught errors, policy violations and dialogs; `requests` the
    addresses it asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.loaded = False
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._browser.call(method, params, self._session)

    def keep(self, event: str, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{params['type']}: {params['args']}")
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(f"error: {params['exceptionDetails']}")
        elif event == "Log.entryAdded":
            self.complaints.append(f"log: {params['entry']}")
        elif event == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")

    def wait_for(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {TIMEOUT_SECONDS:.0f} s for {what}")
            self._browser.receive(deadline)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON; promises are waited for."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", options)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")

    def place(self, selector: str, index: int = 0) -> dict[str, float]:
        """The box of an element inside the window, after scrolling it into view.

        Two frames later: input is dispatched by what was last drawn, and a click may otherwise land where the element
        was before the page scrolled.
        """
        found = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        return self.evaluate(
            f"(async () => {{ {found}.scrollIntoView({{ block: 'center', behavior: 'instant' }});"
            " for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);"
            f" const box = {found}.getClientRects()[0];"
            " return { left: box.left, top: box.top, width: box.width, height: box.height }; })()"
        )

    def mouse(self, kind: str, x: float, y: float, *, held: bool = False) -> None:
        button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" or held else {}
        self.call("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "buttons": int(held), **button})

    def hover(self, selector: str, index: int = 0, across: float = 0.5) -> None:
        box = self.place(selector, index)
        self.mouse("mouseMoved", box["left"] + across * box["width"], box["top"] + box["height"] / 2)

    def click(self, selector: str, index: int = 0, across: float = 0.5) -> None:
        box = self.place(selector, index)
        x, y = box["left"] + across * box["width"], box["top"] + box["height"] / 2
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, held=True)
        self.mouse("mouseReleased", x, y)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Press at the share `start` of an element's width, move to `end`, release."""
        box = self.place(selector)
        y = box["top"] + box["height"] / 2
        first, last = (box["left"] + share * box["width"] for share in (start, end))
        self.mouse("mouseMoved", first, y)
        self.mouse("mousePressed", first, y, held=True)
        for part in (0.25, 0.5, 0.75, 1.0):
            self.mouse("mouseMoved", first + part * (last - first), y, held=True)
        self.mouse("mouseReleased", last, y)

    def press(self, key: str) -> None:
        options = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _CODES[key]}
        self.call("Input.dispatchKeyEvent", {"type": "rawKeyDown", **options})
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **options})

    def choose(self, selector: str, index: int, value: str) -> None:
        """Choose an option of a drop-down list; its menu belongs to the system and cannot be clicked."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{index}]"
        self.evaluate(f"{found}.value = {json.dumps(value)}, {found}.dispatchEvent(new Event('change'))")

    def resize(self, width: int, height: int) -> None:
        options = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", options)

    def emulate(self, *, dark: bool | None = None, media: str = "") -> None:
        """Prefer dark or light, or lay out for `media` ("print")."""
        scheme = "" if dark is None else "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"media": media, "features": features})

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> None:
        options: dict[str, Any] = {"format": "png", "captureBeyondViewport": clip is not None}
        if clip is not None:
            options["clip"] = {
                "x": clip["x"],
                "y": clip["y"],
                "width": clip["width"],
                "height": clip["height"],
                "scale": 1,
            }
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", options)["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, closed at the end."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
