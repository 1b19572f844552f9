"""A state machine as a table: pure, so that every interleaving can be tried, and readable, so that it can be reviewed.

A row says: in `state`, when `event` happens and `when` holds, go to `to` and do `do`, in this order. Rows are tried
from the top; the first that fits counts. An event without a row is a defect and raises. The tables themselves are
`core/prefill/decode_table.py` and `core/prefill/prefill_table.py`; docs/disaggregate.md shows them rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)
Action = TypeVar("Action", bound=StrEnum)
Facts = TypeVar("Facts")


class Row(NamedTuple, Generic[State, Event, Action]):
    """One transition."""

    states: tuple[State, ...]
    event: Event
    when: str
    """Name of a guard, or empty: always."""
    to: State | None
    """None: stay."""
    do: tuple[Action, ...]
    why: str = ""


class Table(Generic[State, Event, Action, Facts]):
    """Rows, and the guards that they name. A guard is asked about the machine's facts, event included."""

    def __init__(
        self,
        rows: Sequence[Row[State, Event, Action]],
        guards: dict[str, Callable[[Facts], bool]],
    ) -> None:
        self.rows = tuple(rows)
        self._guards = guards
        self._index: dict[tuple[State, Event], list[Row[State, Event, Action]]] = {}
        for row in self.rows:
            if row.when and row.when not in guards:
                raise ValueError(f"row for {row.event} names a guard '{row.when}' that does not exist")
            for state in row.states:
                self._index.setdefault((state, row.event), []).append(row)

    def find(self, state: State, event: Event, facts: Facts) -> Row[State, Event, Action]:
        """The row that applies. Raises `LookupError` when none does: the table has a hole."""
        for row in self._index.get((state, event), ()):
            if not row.when or self._guards[row.when](facts):
                return row
        raise LookupError(f"nothing is written down for {event} in {state}")

    def check_complete(self, states: Iterable[State], events: Iterable[Event]) -> None:
        """Raises `AssertionError` where no unguarded row closes a state and event, or where one hides others."""
        events = tuple(events)
        for state in states:
            for event in events:
                found = self._index.get((state, event), [])
                closing = [index for index, row in enumerate(found) if not row.when]
                assert closing == [len(found) - 1], (
                    f"{event} in {state}: the last of {len(found)} rows, and only it, must hold always; found {closing}"
                )

    def render(self) -> str:
        """The table as Markdown."""
        lines = ["| in | when | and | then | do | |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            states = ", ".join(row.states)
            do = ", ".join(row.do) or "-"
            lines.append(f"| {states} | {row.event} | {row.when} | {row.to or 'stay'} | {do} | {row.why} |")
        return "\n".join(lines)
