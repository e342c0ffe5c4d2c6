"""A worker process as its parent sees it: ask, wait, notice that it died."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from bench.host import ROOT

ENVIRONMENT = {
    # Two processes share a GPU: neither takes it whole.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # A thread that waits gives its core away. Spinning, torch is ten times slower on a busy machine.
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ChildDied(Exception):  # noqa: N818
    """The process ended, or was ended, before it answered; the message says why."""


class Worker(Protocol):
    """What the runner needs of a worker, in its own process or not."""

    def send(self, message: dict[str, Any]) -> None: ...

    def receive(self, timeout_s: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Child:
    """A process that runs `bench.worker`.

    Args:
      setup: its first message, see `worker.start`; its stderr goes into the setup's folder, and its
        `environment` is added to that of this process.

    It has its own session, so that Ctrl-C reaches the parent alone, and ends by itself when the
    parent is gone, at the end of what it is doing.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._log = Path(setup["folder"]) / f"{setup['backend']}.log"
        environment = ENVIRONMENT | os.environ | setup.get("environment", {})
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a worker process without pipes")
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self._buffer = b""
        self.send(setup)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Send one command.

        Raises:
          ChildDied: nobody listens.
        """
        try:
            self._commands.write(json.dumps(message).encode() + b"\n")
            self._commands.flush()
        except BrokenPipeError as error:
            raise ChildDied(self._reason()) from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to a command.

        Raises:
          ChildDied: the process ended, or took longer than `timeout_s` and was killed.
        """
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    self.close()
                    raise ChildDied(f"no answer within {timeout_s:.0f} s: stopped")
                piece = os.read(self._answers.fileno(), 2**16)
                if not piece:
                    raise ChildDied(self._reason())
                self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        for stream in (self._commands, self._answers):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _reason(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "killed by SIGKILL, as a system does that runs out of memory"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        return ": ".join([f"the process ended with code {code}", *last])
