"""A real headless browser, spoken to through its debugging pipe: what a page looks like and does to its reader."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--hide-scrollbars",
    "--no-first-run",
)


PATIENCE_S = 60


class Browser:
    """One browser with one page at a time; `errors` has what the console and the network complained of."""

    def __init__(self):
        (self._theirs, to), (back, self._answers) = os.pipe(), os.pipe()
        self._profile = tempfile.mkdtemp(prefix="cvtrain-browser-")
        command = f'exec "$0" "$@" 3<&{self._theirs} 4>&{self._answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}"],
            pass_fds=(self._theirs, self._answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(self._theirs)
        os.close(self._answers)
        self._to, self._back = os.fdopen(to, "wb", buffering=0), back
        self._number, self._session, self._rest, self.errors, self._loaded = 0, None, b"", [], False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self):
        with contextlib.suppress(OSError):
            self._to.close()
        self._process.terminate()
        self._process.wait(20)
        os.close(self._back)
        shutil.rmtree(self._profile, ignore_errors=True)

    def ask(self, method, **params):
        """Send a command of the DevTools protocol and return its result."""
        number = self._send(method, **params)
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _send(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        return self._number

    def _next(self):
        while b"\0" not in self._rest:
            assert select.select([self._back], [], [], PATIENCE_S)[0], "the browser says nothing more"
            got = os.read(self._back, 1 << 20)
            assert got, "the browser has died"
            self._rest += got
        line, self._rest = self._rest.split(b"\0", 1)
        told = json.loads(line)
        method, params = told.get("method"), told.get("params", {})
        self._loaded |= method == "Page.loadEventFired"
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(params)
        if method == "Page.javascriptDialogOpening":  # it would wait for an answer for ever
            self.errors.append(params)
            self._send("Page.handleJavaScriptDialog", accept=True)
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.errors.append(params["request"]["url"])
        return told

    def open(self, path, width=1400, height=900, dark=False):
        """Load a file in a window of `width` × `height` pixels, and wait until it and its pictures are there."""
        self.errors, self._loaded = [], False
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[feature])
        self.ask("Page.navigate", url=f"file://{path}")
        while not self._loaded:
            self._next()
        return self

    def run(self, script):
        """Return the value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key, code=None, text=""):
        """Press a key as a person does."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, **more)

    def screenshot(self, path):
        """Write a picture of the whole page."""
        height = self.run("document.documentElement.scrollHeight")
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(base64.b64decode(data))
