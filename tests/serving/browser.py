"""A page in headless Chromium, driven through the browser's own DevTools protocol: JSON messages, each ended by a zero
byte, on the two pipes that Chromium calls 3 and 4. Needs nothing but the browser."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "there is no Chromium here (chromium, chromium-browser or google-chrome) to open the page in"
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
FLAGS += ["--disable-extensions", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
# The child's pipes get the numbers that Chromium reads and writes; it leads a group, so that all of it can be ended.
START = "import os, sys; from fcntl import F_DUPFD, fcntl; r, w = (fcntl(int(i), F_DUPFD, 10) for i in sys.argv[1:3]); "
START += "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"


class Page:
    """One tab. ``thrown``: what its scripts did not catch. Raises AssertionError for what has not come about in
    ``patience`` seconds."""

    def __init__(self, read: int, write: int, patience: float):
        self._read, self._write, self._patience = read, write, patience
        self._rest, self._number, self._session = b"", 0, None
        self.thrown: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width: int, height: int = 800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str):
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Waits until an expression is true of the page."""
        end = time.monotonic() + self._patience
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never came about: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, **more) -> None:
        code = {"Enter": 13, "Tab": 9}[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": "\r" if key == "Enter" else ""}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **about, **more)

    def hover(self, selector: str) -> None:
        """Moves the mouse over the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getClientRects()[0]"
        x, y = self.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({box})")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **settings) -> dict:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": settings}
        asked |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._told()
            if told.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(json.dumps(told["params"]))
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def _told(self) -> dict:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], self._patience)[0], "the browser says nothing any more"
            part = os.read(self._read, 2**16)
            assert part, "the browser has ended"
            self._rest += part
        told, _, self._rest = self._rest.partition(b"\0")
        return json.loads(told)


@contextmanager
def browser(patience: float = 60):
    """A `Page`; the browser ends with the block, all its processes, and its folder goes."""
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        about = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        command = [sys.executable, "-c", START, str(their_read), str(their_write), *about]
        process = subprocess.Popen(
            command, pass_fds=(their_read, their_write), start_new_session=True, stderr=subprocess.DEVNULL
        )
        os.close(their_read)
        os.close(their_write)
        try:
            yield Page(read, write, patience)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(read)
            os.close(write)
