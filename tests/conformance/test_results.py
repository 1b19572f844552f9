"""Outcomes as data, and the parity matrix made of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from dynamo.testing import matrix
from dynamo.testing.results import EngineResults, Outcome, RuleResult

ROOT = Path(__file__).parents[2]


def rule(group: str, test: str, outcome: Outcome) -> RuleResult:
    """One outcome."""
    return RuleResult(group, test, f"{test} is kept.", outcome)


TORCH = EngineResults(
    "torch",
    "2.13.0",
    [
        rule("streaming", "a", Outcome.HOLDS),
        rule("streaming", "b", Outcome.HOLDS),
        rule("logprobs", "c", Outcome.BROKEN),
        rule("logprobs", "d", Outcome.HOLDS),
        rule("own", "e", Outcome.HOLDS),
    ],
)
ECHO = EngineResults(
    "echo",
    None,
    [
        rule("streaming", "a", Outcome.HOLDS),
        rule("streaming", "b", Outcome.SKIPPED),
        rule("logprobs", "c", Outcome.NOT_APPLICABLE),
    ],
)


def write(folder: Path, *engines: EngineResults) -> Path:
    """The folder, with the engines' results in it."""
    for engine in engines:
        (folder / f"{engine.engine}.json").write_bytes(msgspec.json.encode(engine))
    return folder


def test_matrix_by_group(tmp_path: Path):
    """A line a group in the kit's order, then the author's own; the counts are of applicable rules."""
    table = matrix.by_group(matrix.read(write(tmp_path, TORCH, ECHO))).splitlines()
    assert table[:7] == [
        "| Rules about | echo | torch 2.13.0 |",
        "| --- | --- | --- |",
        "| Streams | ✓ 1/2 | ✓ 2/2 |",
        "| Log-probabilities | – | ✗ 1/2 |",
        "| own | – | ✓ 1/1 |",
        "| **All** | **✓ 1/2** | **✗ 4/5** |",
        "",
    ]


def test_matrix_by_rule(tmp_path: Path):
    """A line a rule, in words; a rule that an engine was not tried on is blank."""
    table = matrix.by_rule(matrix.read(write(tmp_path, TORCH, ECHO))).splitlines()
    assert table[2:7] == [
        "| a is kept. | ✓ | ✓ |",
        "| b is kept. | ? | ✓ |",
        "| c is kept. | – | ✗ |",
        "| d is kept. |  | ✓ |",
        "| e is kept. |  | ✓ |",
    ]


def test_worst_of_several_classes_counts(tmp_path: Path):
    """An engine that breaks a rule with one model breaks it."""
    twice = EngineResults(
        "x", None, [rule("streaming", "a", o) for o in (Outcome.HOLDS, Outcome.BROKEN, Outcome.HOLDS)]
    )
    assert "| Streams | ✗ 0/1 |" in matrix.by_group(matrix.read(write(tmp_path, twice)))


@pytest.mark.parametrize(("engines", "code"), [([ECHO], 0), ([ECHO, TORCH], 1), ([], 2)])
def test_exit_code(tmp_path: Path, engines: list[EngineResults], code: int, capsys: pytest.CaptureFixture[str]):
    """The command fails when a rule is broken, and says what to do when there are no results."""
    assert matrix.main([str(write(tmp_path, *engines))]) == code
    assert bool(engines) == bool(capsys.readouterr().out)


AUTHOR = '''
from dynamo.testing import EngineConformance
from dynamo.testing.rule import rule
from echo_engine import EchoEngine

class Louder(EchoEngine):
    pass

class TestLouder(EngineConformance):
    engine = Louder
    config = {"model": MODEL, "max_model_len": 256}

    @rule()
    async def test_own(self, target):
        """The author has a rule of her own."""
        assert target.host.info.vocab_size == 1
'''


def test_author_with_plain_pytest(tmp_path: Path, tiny_model: Path):
    """An author needs nothing but pytest, no configuration of it, and gets the outcomes as data."""
    (tmp_path / "test_louder.py").write_text(f"MODEL = {str(tiny_model)!r}\n{AUTHOR}")
    options = ["-p", "no:asyncio", "-p", "no:timeout", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", *options, "--rootdir", ".", "."]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples/echo-engine")])
    environment = os.environ | {"DYNAMO_CONFORMANCE_RESULTS": "results", "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout, done.stdout
    (results,) = matrix.read(tmp_path / "results")
    outcomes = {result.test: result for result in results.rules}
    assert results.engine == "echo"
    assert outcomes["test_own"].outcome is Outcome.BROKEN
    assert outcomes["test_own"].rule == "The author has a rule of her own."
    # The assertion was rewritten: it says what was found.
    assert "== 1" in outcomes["test_own"].reason
    assert outcomes["test_exactly_max_tokens"].outcome is Outcome.HOLDS
    assert outcomes["test_greedy_is_arg_max"].outcome is Outcome.NOT_APPLICABLE
    assert "does not declare logprobs" in outcomes["test_greedy_is_arg_max"].reason
    assert {result.group for result in results.rules} >= matrix.TITLES.keys()
