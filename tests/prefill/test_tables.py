"""The transition tables have no hole and no row that is never reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.prefill import decode_table, prefill_table
from core.prefill.session import render_tables


@pytest.mark.parametrize("side", [decode_table, prefill_table], ids=["decode", "prefill"])
def test_every_event_that_can_come_is_answered_in_every_state(side):
    for event, states in side.REACHABLE.items():
        side.TABLE.check_complete(states, [event])
    assert set(side.REACHABLE) == set(side.E)


@pytest.mark.parametrize("side", [decode_table, prefill_table], ids=["decode", "prefill"])
def test_every_row_is_about_a_state_in_which_its_event_can_come(side):
    for row in side.TABLE.rows:
        assert set(row.states) <= set(side.REACHABLE[row.event]), row


@pytest.mark.parametrize("side", [decode_table, prefill_table], ids=["decode", "prefill"])
def test_every_action_and_every_state_is_used(side):
    used = {action for row in side.TABLE.rows for action in row.do}
    assert used == set(side.A)
    reached = {row.to for row in side.TABLE.rows} | {side.S.IDLE}
    assert set(side.S) <= reached


def test_the_documentation_shows_the_tables_as_they_are():
    page = Path(__file__).parents[2] / "docs" / "disaggregate.md"
    shown = page.read_text().partition("### Every transition\n\n")[2]
    assert shown == render_tables(), "write core.prefill.session.render_tables() to the end of docs/disaggregate.md"
