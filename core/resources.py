"""Finds what ships with the project: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(relative: str) -> Path:
    """The path of a shipped file or folder, such as "models/demo" or "configs/agg.yaml".

    Raises `FileNotFoundError` when this installation does not have it.
    """
    places = [_PACKAGE / "share" / relative, _PACKAGE.parent / relative]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(f"{relative} is not part of this installation; looked in {places[0]} and {places[1]}")
