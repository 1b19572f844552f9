"""Makes the parity matrix of the README: `python -m dynamo.testing.matrix FOLDER`.

FOLDER holds what the kit wrote with `DYNAMO_CONFORMANCE_RESULTS=FOLDER pytest ...`, one JSON file an engine. The
matrix has a line for each group of rules, or with `--rules` for each rule, and a column for each engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from dynamo.testing.results import EngineResults, Outcome, RuleResult

TITLES = {
    "streaming": "Streams",
    "sampling": "Sampling",
    "penalties": "Penalties",
    "stopping": "Stop conditions",
    "logprobs": "Log-probabilities",
    "structured": "Structured output",
    "limits": "Refusals",
    "aborting": "Aborts",
    "loads": "Load figures",
    "caching": "Prefix cache and KV events",
    "pressure": "Full engine, priority, drain",
    "lifecycle": "Life cycle",
    "handing": "Disaggregated: same answers",
    "moving": "Disaggregated: KV, tickets, leases",
    "failing": "Disaggregated: aborts and failures",
}
SIGNS = {Outcome.HOLDS: "✓", Outcome.BROKEN: "✗", Outcome.NOT_APPLICABLE: "–", Outcome.SKIPPED: "?"}
LEGEND = "✓ holds, ✗ broken, – the engine does not declare the capability, ? not tried"


def read(folder: Path) -> list[EngineResults]:
    """Results of every engine in the folder, by name. Raises `FileNotFoundError` when there is none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no results in '{folder}': run DYNAMO_CONFORMANCE_RESULTS={folder} pytest first")
    return [msgspec.json.decode(file.read_bytes(), type=EngineResults) for file in files]


def by_group(engines: Sequence[EngineResults]) -> str:
    """A Markdown table with a line a group: how many of the applicable rules hold."""
    found = {rule.group for engine in engines for rule in engine.rules}
    groups = [group for group in TITLES if group in found] + sorted(found - TITLES.keys())
    lines = [_row(["Rules about", *map(_heading, engines)]), _row(["---"] * (len(engines) + 1))]
    for group in groups:
        cells = [_count(rule for rule in engine.rules if rule.group == group) for engine in engines]
        lines.append(_row([TITLES.get(group, group), *cells]))
    lines.append(_row(["**All**", *(f"**{_count(engine.rules)}**" for engine in engines)]))
    return "\n".join([*lines, "", "Rules that hold, of those that apply; – where none does."])


def by_rule(engines: Sequence[EngineResults]) -> str:
    """A Markdown table with a line a rule."""
    lines = [_row(["Rule", *map(_heading, engines)]), _row(["---"] * (len(engines) + 1))]
    rules = {(rule.group, rule.test): rule.rule for engine in engines for rule in engine.rules}
    outcomes = [{(rule.group, rule.test): rule.outcome for rule in _worst(engine.rules)} for engine in engines]
    order = list(TITLES)
    for key in sorted(rules, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), key)):
        cells = [SIGNS[outcome[key]] if key in outcome else "" for outcome in outcomes]
        lines.append(_row([rules[key].replace("|", "\\|"), *cells]))
    return "\n".join([*lines, "", LEGEND])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the matrix. Gives 1 when an engine breaks a rule, 2 when there are no results."""
    parser = argparse.ArgumentParser(prog="python -m dynamo.testing.matrix", description="Print the parity matrix.")
    parser.add_argument("folder", type=Path, help="folder with the results, one JSON file an engine")
    parser.add_argument("--rules", action="store_true", help="a line for each rule instead of each group")
    options = parser.parse_args(arguments)
    try:
        engines = read(options.folder)
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write((by_rule if options.rules else by_group)(engines) + "\n")
    return int(any(rule.outcome is Outcome.BROKEN for engine in engines for rule in engine.rules))


def _worst(rules: Iterable[RuleResult]) -> list[RuleResult]:
    """One result a rule: the worst, where several classes tried the engine."""
    order = [Outcome.NOT_APPLICABLE, Outcome.SKIPPED, Outcome.HOLDS, Outcome.BROKEN]
    worst: dict[tuple[str, str], RuleResult] = {}
    for rule in rules:
        key = (rule.group, rule.test)
        if key not in worst or order.index(rule.outcome) > order.index(worst[key].outcome):
            worst[key] = rule
    return list(worst.values())


def _count(rules: Iterable[RuleResult]) -> str:
    outcomes = [rule.outcome for rule in _worst(rules) if rule.outcome is not Outcome.NOT_APPLICABLE]
    holding = outcomes.count(Outcome.HOLDS)
    if not outcomes:
        return SIGNS[Outcome.NOT_APPLICABLE]
    sign = SIGNS[Outcome.BROKEN] if Outcome.BROKEN in outcomes else SIGNS[Outcome.HOLDS]
    return f"{sign} {holding}/{len(outcomes)}"


def _heading(engine: EngineResults) -> str:
    return f"{engine.engine} {engine.version}" if engine.version else engine.engine


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
