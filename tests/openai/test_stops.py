"""Stop strings: found whatever the split, nothing of them shown, nothing else withheld."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from core.openai.stops import StopMatcher

LETTERS = st.text(alphabet="ab<", max_size=30)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=5), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 5), max_size=30)


def expected(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """By definition: the stop string complete first, of those the longest."""
    for end in range(1, len(text) + 1):
        hits = [s for s in stops if text[:end].endswith(s)]
        if hits:
            longest = max(hits, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(text=LETTERS, stops=STOPS, cuts=CUTS, include=st.booleans())
@example(text="aab", stops=["ab"], cuts=[1, 1, 1], include=False)
@example(text="abab<", stops=["abab<a", "b<"], cuts=[2, 2], include=False)
def test_outcome_does_not_depend_on_the_split(text: str, stops: list[str], cuts: list[int], include: bool):
    matcher = StopMatcher(tuple(stops), include=include)
    shown, seen, rest = "", "", text
    for cut in [*cuts, len(text)]:
        piece, rest = rest[:cut], rest[cut:]
        if not piece:
            continue
        seen += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            break
        withheld = seen[len(shown) :]
        assert seen.startswith(shown)
        begun = [k for s in stops for k in range(1, len(s)) if seen.endswith(s[:k])]
        assert len(withheld) == max(begun, default=0), "exactly what may become a stop string is withheld"
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == expected(text, stops, include=include)


def test_long_adversarial_text_is_linear():
    matcher = StopMatcher(("a" * 1000 + "b",))
    assert len("".join(matcher.push("a" * 10) for _ in range(5000))) == 50_000 - 1000
    assert matcher.flush() == "a" * 1000
