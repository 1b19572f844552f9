"""`PrefillSession`: the state machine of a remote prefill, on either side, for pull, push and handshake alike.

Pure: events go in, actions come out, nothing is awaited and no clock is read. The drivers
(`core/prefill/decode_side.py`, `core/prefill/prefill_side.py`) carry the actions out; the property tests try every
interleaving without them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

from core.messages.engine import Rendezvous
from core.prefill import decode_table, prefill_table
from core.prefill.decode_table import DecodeFacts
from core.prefill.machine import Table
from core.prefill.prefill_table import PrefillFacts

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)
A = TypeVar("A", bound=StrEnum)
F = TypeVar("F")


class Step(NamedTuple, Generic[A]):
    """One thing to do."""

    action: A
    attempt: str = ""
    """The attempt that it concerns, on the decode side."""


class PrefillSession(Generic[S, E, A, F]):
    """One half of one remote prefill."""

    def __init__(self, table: Table[S, E, A, F], start: S, end: S, facts: F) -> None:
        self._table = table
        self._end = end
        self.state = start
        self.facts = facts

    @property
    def over(self) -> bool:
        """Nothing but late messages can come any more."""
        return self.state == self._end

    def happen(self, event: E, **facts: Any) -> list[A]:
        """What to do about an event, in order. `facts` describe the event to the guards.

        Raises `LookupError` for an event that cannot come in this state: a defect of the driver.
        """
        for name, value in facts.items():
            setattr(self.facts, name, value)
        row = self._table.find(self.state, event, self.facts)
        if row.to is not None:
            self.state = row.to
        return list(row.do)


_CURRENT = frozenset({decode_table.A.LET_GO_CURRENT, decode_table.A.REFUSE_CURRENT})


class DecodeSession(PrefillSession[decode_table.S, decode_table.E, decode_table.A, DecodeFacts]):
    """The decode worker's half. Follows which attempt is the current one."""

    def __init__(self, *, fallback: bool = True, poison_falls_back: bool = False) -> None:
        facts = DecodeFacts(fallback=fallback, poison_falls_back=poison_falls_back)
        super().__init__(decode_table.TABLE, decode_table.S.IDLE, decode_table.S.ENDED, facts)

    def step(
        self,
        event: decode_table.E,
        attempt: str = "",
        rendezvous: Rendezvous | None = None,
        *,
        delivery: int = 0,
        **facts: Any,
    ) -> list[Step[decode_table.A]]:
        """As `happen`, with each action's attempt. With `TAKEN`, `rendezvous` is the kind that the worker chose, and
        `delivery` that of the task (`Taken.delivery`).
        """
        clear: dict[str, Any] = {"failure": None, "rejected": False, "ended": False}
        steps: list[Step[decode_table.A]] = []
        for action in self.happen(event, attempt=attempt, delivery=delivery, **{**clear, **facts}):
            if action is decode_table.A.ADOPT:
                self.facts.current, self.facts.rendezvous, self.facts.newest = attempt, rendezvous, delivery
            elif action is decode_table.A.FORGET:
                self.facts.current, self.facts.rendezvous = "", None
            else:
                concerned = attempt or self.facts.current
                if action is decode_table.A.REFUSE and delivery > self.facts.newest:
                    self.facts.spent = True
                if action in _CURRENT:
                    concerned = self.facts.current
                elif action is decode_table.A.CONCEAL:
                    concerned = attempt
                steps.append(Step(action, concerned))
        if self.state is decode_table.S.GIVING_UP:
            steps += self.step(decode_table.E.NEXT)
        return steps


class WorkerSession(PrefillSession[prefill_table.S, prefill_table.E, prefill_table.A, PrefillFacts]):
    """The prefill worker's half of one attempt."""

    def __init__(self, rendezvous: Rendezvous, *, last: bool) -> None:
        """`last`: no further try is allowed, so a failure makes a dead letter."""
        facts = PrefillFacts(last=last, rendezvous=rendezvous)
        super().__init__(prefill_table.TABLE, prefill_table.S.IDLE, prefill_table.S.ENDED, facts)

    def step(self, event: prefill_table.E, **facts: Any) -> list[prefill_table.A]:
        """As `happen`; what an earlier event was is forgotten first."""
        clear: dict[str, Any] = {
            "rejected": False,
            "blameless": False,
            "aborted": False,
            "ended": False,
            "outcome": None,
        }
        return self.happen(event, **{**clear, **facts})


def render_tables() -> str:
    """Both tables as Markdown, as they stand in docs/disaggregate.md."""
    return (
        "#### The decode worker's half\n\n"
        + decode_table.TABLE.render()
        + "\n\n#### The prefill worker's half\n\n"
        + prefill_table.TABLE.render()
        + "\n"
    )
