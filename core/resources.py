"""Finds what ships with the project: from a checkout first, then from the installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(relative: str) -> Path:
    """The path of a shipped file or folder, such as "models/demo" or "configs/agg.yaml".

    Raises `FileNotFoundError` when this installation does not have it.
    """
    places = [_PACKAGE.parent / relative, _PACKAGE / "share" / relative]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"{relative} is not part of this installation; looked in {places[0]} and {places[1]}")
