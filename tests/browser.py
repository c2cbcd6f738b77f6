"""A headless Chromium for tests of pages, driven over its DevTools pipe; nothing but Chromium is needed."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page. Everything it asked for and everything on its console is kept.

    Attributes:
        requests: URLs that the page asked for, `data:` ones left out.
        console: what it printed, its exceptions and its security violations.
    """

    def __init__(self, width: int = 1200, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        browser = find_browser()
        if browser is None:
            raise FileNotFoundError("no Chromium")
        self.requests: list[str] = []
        self.console: list[str] = []
        self._numbers = itertools.count(1)
        self._profile = tempfile.mkdtemp(prefix="page-")
        self._buffer = b""
        down, self._write = os.pipe()
        self._read, up = os.pipe()
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--no-first-run", "--hide-scrollbars", f"--user-data-dir={self._profile}"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += ["--remote-debugging-pipe", "about:blank"]

        # Chromium reads commands from descriptor 3 and answers on 4; a shell puts the pipes there.
        places = f'exec 3<&{down} 4>&{up}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", places, "bash", *command],
            pass_fds=(down, up),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        try:
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            self._session: str | None = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            self.resize(width, height, scale)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.send("Emulation.setEmulatedMedia", features=[scheme])
        except BaseException:
            self.close()
            raise

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Set the window's size in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def open(self, path: Path | str) -> None:
        """Open a file, or a URL, and wait until it and its pictures are there."""
        self.send("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        until = time.monotonic() + 30
        ready = "document.readyState == 'complete' && location.href != 'about:blank'"
        while not self.value(ready):
            if time.monotonic() > until:
                raise TimeoutError(f"{path} did not load")
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression evaluates to, in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"].get("description", expression))
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(answer["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A DevTools command to the page, and its answer."""
        return self._send(method, self._session, **parameters)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            answer = self._next(until)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise ConnectionError("Chromium has ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _note(self, event: dict[str, Any]) -> None:
        name, details = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            url = details["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
        elif name == "Runtime.consoleAPICalled":
            self.console.append(json.dumps(details["args"]))
        elif name == "Runtime.exceptionThrown":
            self.console.append(json.dumps(details["exceptionDetails"]))
        elif name == "Log.entryAdded":
            self.console.append(details["entry"]["text"])

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(Exception):
            self._send("Browser.close")
        for descriptor in (self._write, self._read):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
