"""The hint at the end of an error about an unknown name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """A question when something known is like `word`; else `otherwise`, by default the list of what is known."""
    names = sorted(set(known))
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), folded, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(folded[n] for n in near)}?"
    return f"known are {', '.join(names) or 'none'}." if otherwise is None else otherwise
