"""Outcomes of the kit as data: one JSON file an engine, from which the parity matrix is made."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec
import pytest

from core.engine import Adapter

STASH = pytest.StashKey["Recorder"]()


class Outcome(StrEnum):
    """What became of one rule on one engine."""

    HOLDS = "holds"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"
    """About a capability that the engine does not declare."""
    SKIPPED = "skipped"
    """Not tried, for another reason."""


class RuleResult(msgspec.Struct, frozen=True):
    """One rule on one engine."""

    group: str
    test: str
    rule: str
    """The rule of the contract, one sentence."""
    outcome: Outcome
    reason: str = ""


class EngineResults(msgspec.Struct):
    """All rules on one engine."""

    engine: str
    version: str | None
    """Of the engine's package."""
    rules: list[RuleResult] = []


class Recorder:
    """Collects outcomes while pytest runs; writes them when it ends."""

    def __init__(self) -> None:
        self._of_class: dict[type, EngineResults] = {}
        self._files: dict[str, tuple[Path, EngineResults]] = {}

    @classmethod
    def of(cls, config: pytest.Config) -> Recorder:
        """The session's recorder; registered as a plug-in when first asked for."""
        if STASH not in config.stash:
            config.stash[STASH] = cls()
            config.pluginmanager.register(config.stash[STASH], "dynamo-conformance-results")
        return config.stash[STASH]

    def begin(self, test_class: type, adapter: Adapter, folder: Path) -> None:
        """From here on the class's outcomes go to `folder/ENGINE.json`, together with other classes' of the engine."""
        name = adapter.description.name
        _, results = self._files.setdefault(name, (folder / f"{name}.json", EngineResults(name, adapter.version)))
        self._of_class[test_class] = results

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        """Notes what became of a test: of its call, or of the set-up that failed or skipped it."""
        report: pytest.TestReport = yield  # type: ignore[assignment]
        results = self._of_class.get(getattr(item, "cls", None) or object)
        if results is not None and isinstance(item, pytest.Function) and (call.when == "call" or not report.passed):
            results.rules.append(_result(item, report))
        return report  # type: ignore[return-value]

    def pytest_sessionfinish(self) -> None:
        """Writes the files."""
        for path, results in self._files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def _result(item: pytest.Function, report: pytest.TestReport) -> RuleResult:
    outcome, reason = Outcome.HOLDS, ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        outcome = Outcome.NOT_APPLICABLE if reason.startswith("not applicable") else Outcome.SKIPPED
    elif report.failed:
        outcome = Outcome.BROKEN
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else str(report.longrepr)).partition("\n")[0]
    doc = (item.function.__doc__ or "").strip().partition("\n\n")[0]
    return RuleResult(
        group=item.function.__module__.rpartition(".")[2],
        test=item.name,
        rule=" ".join(doc.split()),
        outcome=outcome,
        reason=reason,
    )
