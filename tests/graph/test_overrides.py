"""The spellings of an override on the command line."""

import pytest

from core.graph import SettingError
from core.graph.config import split_arguments


@pytest.mark.parametrize(
    "arguments",
    [["--W.a=1"], ["--W.a", "1"], ["--W.a", "=", "1"], ["--W.a", "=1"]],
)
def test_every_spelling_is_the_same(arguments):
    assert split_arguments(["graphs.agg", *arguments, "--dry-run"]) == (["graphs.agg", "--dry-run"], [("W.a", "1")])


def test_negative_numbers_and_everything_after_an_equals_sign_are_values():
    arguments = ["--W.a", "-5", "--W.b=-x", "--W.c", "=", "-.5", "--W.d=a=b", "--W.e="]
    assert split_arguments(arguments)[1] == [("W.a", "-5"), ("W.b", "-x"), ("W.c", "-.5"), ("W.d", "a=b"), ("W.e", "")]


@pytest.mark.parametrize("arguments", [["--W.a"], ["--W.a", "--dry-run"], ["--W.a", "="], ["--W.a", "-x"]])
def test_an_override_without_a_value_is_refused(arguments):
    with pytest.raises(SettingError, match="has no value; write --W"):
        split_arguments(arguments)


def test_after_two_dashes_nothing_is_an_override():
    assert split_arguments(["--", "--W.a=1"]) == (["--", "--W.a=1"], [])


def test_options_and_graphs_are_left_alone():
    arguments = ["graphs.agg:Frontend", "-f", "configs/agg.yaml", "--port=80", "--log-level", "info"]
    assert split_arguments(arguments) == (arguments, [])
