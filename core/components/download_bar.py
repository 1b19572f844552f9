"""Shows a download as the progress of the replica that waits for it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

_CELLS = 20


def download_bar(model: str, report: Callable[[str], None]) -> type[Any]:
    """A bar class for `huggingface_hub` that reports, instead of drawing, each twentieth of the bytes."""
    from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

    class Bar(hub_tqdm):
        filled = -1

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"file": io.StringIO()}))  # type: ignore[no-untyped-call]

        def display(self, *_: object, **__: object) -> None:
            # Of the hub's two bars in bytes, the one that counts what has been written.
            if self.unit != "B" or not self.total or self.desc.startswith("Downloading"):
                return
            filled = min(_CELLS, int(_CELLS * self.n / self.total))
            if filled != self.filled:
                self.filled = filled
                bar = "#" * filled + "." * (_CELLS - filled)
                report(f"fetching {model} [{bar}] {self.n / 1e6:.0f} of {self.total / 1e6:.0f} MB")

    return Bar
