"""What the operator sees while a graph starts and stops: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from core.graph import ReplicaEvent, State

_QUIET = {State.STARTING, State.STOPPED}


class Display:
    """Writes progress to stderr and the final banner to stdout."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._began = time.monotonic()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Show progress for the length of the block."""
        if not self._err.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as progress:
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def on_event(self, event: ReplicaEvent) -> None:
        """For `Deployment(observe=...)`."""
        name = f"{event.service}-{event.replica}"
        text = event.text or str(event.state)
        if self._progress is not None:
            self._show(name, text, done=event.state is State.READY)
        elif event.state not in _QUIET:
            label = text if event.state is State.PROGRESS else f"{event.state} {event.text}".rstrip()
            self._err.print(f"{name}: {label}", markup=False)

    def ready(self, graph: str, announcements: Iterable[str]) -> None:
        """Everything is up."""
        seconds = time.monotonic() - self._began
        self._out.print(f"{graph} is ready after {seconds:.1f} s", markup=False)
        for text in announcements:
            self._out.print(f"\n{text}", markup=False)
        self._out.print("\nCtrl-C finishes the running requests and stops; a second one stops at once.", markup=False)
        self._out.file.flush()

    def say(self, text: str) -> None:
        """One line on stderr."""
        self._err.print(text, markup=False)

    def _show(self, name: str, text: str, *, done: bool) -> None:
        assert self._progress is not None
        known = next((t for t in self._progress.tasks if t.fields.get("replica") == name), None)
        description = f"{name}: {text}"
        if known is None:
            task = self._progress.add_task(description, total=1, replica=name)
        else:
            task = known.id
            self._progress.update(task, description=description)
        if done:
            self._progress.update(task, completed=1)
