"""A headless Chromium, as far as tests need one."""

import fcntl
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

SIZES = {"wide": (1400, 900), "phone": (390, 844)}
NAMES = "chromium", "chromium-browser", "google-chrome"


class Browser:
    """A headless Chromium, spoken to through a pair of pipes in its DevTools protocol."""

    def __init__(self, program: str, folder: Path):
        self.program = program
        to_browser, self.writes = os.pipe()
        self.reads, from_browser = os.pipe()
        # It reads from 3 and writes to 4: ends that stand there themselves move out of the way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser, from_browser)]
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.log = folder / "log"
        self.pid = os.posix_spawn(
            program,
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, ends[0], 3),
                (os.POSIX_SPAWN_DUP2, ends[1], 4),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self.held, self.number, self.events = b"", 0, []

    def receive(self, end: float) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.held:
            if not select.select([self.reads], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            if not (more := os.read(self.reads, 1 << 16)):
                raise EOFError(f"the browser has ended: {self.log.read_text()[-2000:]}")
            self.held += more
        message, _, self.held = self.held.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """What a method returns; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 30
        while (reply := self.receive(end)).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def close(self) -> None:
        try:
            self.call("Browser.close")
        finally:
            os.close(self.writes)
            os.close(self.reads)
            end = time.monotonic() + 10
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.05)


class Tab:
    """A page in a tab of its own: what it holds, asks for, and complains of."""

    def __init__(self, browser: Browser, url: str, size: str, theme: str, before: str = ""):
        """before: a script that runs in it before its own."""
        self.browser, self.address = browser, url.rstrip("/")
        browser.events.clear()
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call(
            "Target.createTarget", url="about:blank", browserContextId=self.context
        )["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*SIZES[size], mobile=size == "phone")
        scheme = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === '{url}' && document.readyState === 'complete'")

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def resize(self, width: int, height: int, *, mobile: bool) -> None:
        size = {"width": width, "height": height, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, **size)

    def see(self, expression: str) -> Any:
        """What an expression is in the page."""
        told = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """What an expression is in the page once that is true of anything."""
        end = time.monotonic() + seconds
        while not (value := self.see(expression)):
            text = self.see("document.body?.innerText")
            assert time.monotonic() < end, f"{expression} stays {value!r}: {text}"
            time.sleep(0.01)
        return value

    def events(self, method: str) -> list[dict[str, Any]]:
        self.see("0")  # what has happened before has been told by now
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event.get("method") == method
        ]

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def faults(self, is_theirs: bool = False) -> list[str]:
        """What a script raised, what the policy forbade, and requests that went elsewhere.

        is_theirs: the scripts and styles are those of a theme, which logs, and inlines data.
        """
        found = [str(event["exceptionDetails"]) for event in self.events("Runtime.exceptionThrown")]
        for event in self.events("Log.entryAdded"):  # an HTTP status of 400 is one, of the network
            if event["entry"]["level"] == "error" and event["entry"]["source"] != "network":
                found.append(event["entry"]["text"])
        said = self.events("Runtime.consoleAPICalled")
        found += [str(event) for event in said if not (is_theirs and event["type"] == "log")]
        own = ("/".join(self.address.split("/")[:3]) + "/", *["data:"] * is_theirs)
        return found + [url for url in self.requests() if not url.startswith(own)]
