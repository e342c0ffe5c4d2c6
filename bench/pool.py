"""The worker processes of a run: one a backend, started when needed, replaced when they die."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.process import ChildDied, Worker

Answer = dict[str, Any]
StartWorker = Callable[[dict[str, Any]], Worker]

START_S = 120.0  # that a worker may take to import its framework


class Pool:
    """Asks workers and turns their death into an answer.

    Args:
      setups: first message to the worker of each backend, see `worker.start`.
      start_worker: a worker from its setup.
      deadline: `time.monotonic` at which an answer is no longer waited for.
    """

    def __init__(
        self, setups: Mapping[str, dict[str, Any]], start_worker: StartWorker, deadline: float
    ) -> None:
        self._setups, self._start, self._deadline = setups, start_worker, deadline
        self._workers: dict[str, Worker] = {}

    def ask(self, backend: str, message: dict[str, Any]) -> Answer:
        """The answer of one worker; `failed` with `died` when it ended instead."""
        return self.ask_all([backend], message)[backend]

    def ask_all(
        self, backends: Sequence[str], message: dict[str, Any], meanwhile: Callable[[], None] | None = None
    ) -> dict[str, Answer]:
        """The answers of several workers that work at the same time; `meanwhile` runs beside them."""
        answers: dict[str, Answer] = {}
        for backend in backends:
            try:
                self._worker(backend).send(message)
            except ChildDied as death:
                answers[backend] = self._bury(backend, death)
        if meanwhile is not None:
            meanwhile()
        for backend in backends:
            if backend in answers:
                continue
            try:
                answers[backend] = self._workers[backend].receive(max(self._deadline - time.monotonic(), 1.0))
            except ChildDied as death:
                answers[backend] = self._bury(backend, death)
        return answers

    def start_all(self, backends: Sequence[str]) -> dict[str, Answer]:
        """Start workers side by side; what each runs on, or why it cannot."""
        for backend in backends:
            self._workers[backend] = self._start(self._setups[backend])
        answers = {}
        for backend in backends:
            try:
                answers[backend] = self._workers[backend].receive(START_S)
            except ChildDied as death:
                answers[backend] = self._bury(backend, death)
            if answers[backend]["status"] != "ok" and backend in self._workers:
                self._workers.pop(backend).close()
        return answers

    def end(self, backend: str) -> None:
        """End a worker: the next command starts another."""
        worker = self._workers.pop(backend, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _worker(self, backend: str) -> Worker:
        if backend not in self._workers:
            answer = self.start_all([backend])[backend]
            if answer["status"] != "ok":
                raise ChildDied(f"could not be started again: {answer['reason']}")
        return self._workers[backend]

    def _bury(self, backend: str, death: ChildDied) -> Answer:
        self.end(backend)
        return {"status": "failed", "reason": str(death), "is_memory": "SIGKILL" in str(death)}
