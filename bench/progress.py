"""What the user sees while a run goes on: a bar on a terminal, lines everywhere."""

import sys
from types import TracebackType
from typing import Any


class Progress:
    """Counts points; prints lines above a bar where there is a terminal and rich is installed."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._total = 0
        self._done = 0

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                self.line("rich is not installed: lines instead of a progress bar")
            else:
                columns = progress.TextColumn("{task.description}"), progress.BarColumn()
                counts = progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
                self._bar = progress.Progress(*columns, *counts, transient=True, refresh_per_second=2)
                self._bar.start()
                self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, total: int) -> None:
        """Say how many points there are in all."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def now(self, text: str) -> None:
        """Say what is going on; without a bar nothing is printed."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def line(self, text: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def point(self, text: str | None) -> None:
        """Count a point, with a line where there is something to say."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        if text:
            self.line(f"[{self._done:>{len(str(self._total))}}/{self._total}] {text}")
