"""What the core refuses on every engine's behalf, and that it leaves everything else as it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.engine.admission import Admission
from core.messages import (
    Capabilities,
    Constraint,
    ConstraintKind,
    EngineDescription,
    EngineInfo,
    EngineRequest,
    RequestRejected,
    SamplingParams,
    StopConditions,
)
from tests.engine.adapters import request

INFO = EngineInfo(vocab_size=100, max_model_len=16, eos_token_ids=(0,))


def gate(**capabilities: Any) -> Admission:
    """The gate of an engine with these capabilities."""
    about = EngineDescription(name="plain", summary="s", capabilities=Capabilities(**capabilities))
    return Admission(about, INFO)


def refused(admission: Admission, asked: EngineRequest) -> RequestRejected:
    """Why the request is refused."""
    with pytest.raises(RequestRejected) as error:
        admission.admit(asked)
    return error.value


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "The prompt is empty"),
        ([1] * 16, "The prompt has 16 tokens and the model's longest sequence, prompt and answer together, is 16"),
        ([1, -1], "Token id -1 in the prompt is outside the vocabulary, 0 to 99"),
        ([100, 1], "Token id 100 in the prompt is outside the vocabulary"),
    ],
)
def test_impossible_prompt(tokens: list[int], says: str):
    """A prompt that no engine can serve is refused, naming the parameter."""
    error = refused(gate(), request(tokens))
    assert says in str(error)
    assert error.param == "prompt"


def test_longest_prompt():
    """A prompt that leaves room for one token is admitted, and max_tokens is clipped to it."""
    admitted = gate().admit(request([1] * 15, 9))
    assert admitted.stop.max_tokens == 1
    assert gate().admit(request([0, 99], 14)).stop.max_tokens == 14


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -1}, "top_k is -1; it must be 0 (off) or more"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"presence_penalty": -2.1}, "presence_penalty is -2.1; it must be from -2 to 2"),
        ({"frequency_penalty": 3.0}, "frequency_penalty is 3.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"logit_bias": {100: 1.0}}, "Token id 100 in logit_bias"),
        ({"logit_bias": {-1: 1.0, 5: 1.0}}, "Token id -1 in logit_bias"),
        ({"bad_token_sequences": ((1,), ())}, "holds an empty sequence"),
        ({"bad_token_sequences": ((1, 200),)}, "Token id 200 in bad_token_sequences"),
    ],
)
def test_sampling_out_of_range(sampling: dict[str, Any], says: str):
    """A sampling parameter out of its range is refused by name."""
    error = refused(gate(), request(sampling=SamplingParams(**sampling)))
    assert says in str(error)
    assert error.param == next(iter(sampling))


@pytest.mark.parametrize(
    ("stop", "param"), [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1, "min_tokens": -1}, "min_tokens")]
)
def test_stop_out_of_range(stop: dict[str, int], param: str):
    """Stop conditions out of their range are refused by name."""
    asked = EngineRequest(request_id="r", token_ids=[1], stop=StopConditions(**stop))
    assert refused(gate(), asked).param == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("top_k", 5),
        ("min_p", 0.5),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("repetition_penalty", 2.0),
        ("seed", 0),
        ("logit_bias", {1: 1.0}),
        ("bad_token_sequences", ((1,),)),
    ],
)
def test_undeclared_sampling(field: str, value: Any):
    """Each sampling parameter is refused by an engine that does not declare it, and admitted by one that does."""
    asked = request(sampling=SamplingParams(**{field: value}))
    others = frozenset(SamplingParams.__struct_fields__) - {field}
    error = refused(gate(sampling=others), asked)
    assert str(error) == f"Engine 'plain' does not support '{field}': leave it out."
    assert (error.param, error.code) == (field, "unsupported_by_engine")
    assert gate(sampling=frozenset({field})).admit(asked) is asked


def test_every_sampling_parameter_is_covered():
    """The test above knows every parameter there is."""
    marks = [mark for mark in test_undeclared_sampling.pytestmark if mark.name == "parametrize"]
    assert {field for field, _ in marks[0].args[1]} == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(
    ("fields", "capabilities", "says"),
    [
        ({"logprobs": 0}, {"logprobs": True}, "gives no logprobs"),
        ({"prompt_logprobs": 1}, {"prompt_logprobs": True}, "gives no prompt_logprobs"),
        (
            {"constraint": Constraint(ConstraintKind.REGEX, "a")},
            {"constraints": frozenset({ConstraintKind.REGEX})},
            "has no structured output of kind 'regex'; it has none",
        ),
        ({"lora": "tuned"}, {"lora": True}, "serves no LoRA adapters"),
        ({"priority": 1}, {"priority": True}, "has no priorities"),
    ],
)
def test_undeclared_features(fields: dict[str, Any], capabilities: dict[str, Any], says: str):
    """What is undeclared is refused in a sentence; declared, it is admitted unchanged."""
    asked = request(**fields)
    error = refused(gate(), asked)
    assert f"Engine 'plain' {says}" in str(error)
    assert error.code == "unsupported_by_engine"
    assert gate(**capabilities).admit(asked) is asked


@pytest.mark.parametrize("count", [-1, 21])
def test_logprobs_out_of_range(count: int):
    """Log-probabilities are of none to twenty tokens beside the chosen one."""
    assert f"logprobs is {count}; it must be from 0 to 20" in str(refused(gate(logprobs=True), request(logprobs=count)))


def test_ranks():
    """A data-parallel rank has to exist."""
    assert gate().admit(request(data_parallel_rank=0))
    assert "rank 1 does not exist; this worker has ranks 0 to 0" in str(refused(gate(), request(data_parallel_rank=1)))


@pytest.mark.parametrize("prior", [3, 4, -1])
def test_prior_tokens_out_of_range(prior: int):
    """Prior tokens leave at least one prompt token before them."""
    assert "at least one prompt token comes before" in str(refused(gate(), request([1, 2, 3], prior_tokens=prior)))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"sampling": SamplingParams(seed=1)}, "seed"),
        ({"sampling": SamplingParams(presence_penalty=1)}, "penalties"),
        ({"sampling": SamplingParams(frequency_penalty=1)}, "penalties"),
        ({"constraint": Constraint(ConstraintKind.REGEX, "a")}, "constraint"),
    ],
)
def test_undeclared_continuation(fields: dict[str, Any], what: str):
    """A sequence whose state cannot be restored is not resumed, and a first attempt is served."""
    constraints = frozenset(ConstraintKind)
    cannot = gate(continues=frozenset(), constraints=constraints)
    assert "cannot resume a sequence that uses" in str(refused(cannot, request(prior_tokens=1, **fields)))
    assert cannot.admit(request(**fields))
    assert gate(continues=frozenset({what}), constraints=constraints).admit(request(prior_tokens=1, **fields))


def test_greedy_continuation():
    """Greedy sequences are resumed by every engine, seed or no seed."""
    greedy = SamplingParams(temperature=0, seed=1, repetition_penalty=1.2)
    assert gate(continues=frozenset()).admit(request(prior_tokens=1, sampling=greedy))


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(-2, 102), max_size=20),
    max_tokens=st.integers(-1, 40),
    temperature=st.floats(-1, 3),
    top_p=st.floats(-0.5, 1.5),
)
def test_admitted_requests_are_possible(tokens: list[int], max_tokens: int, temperature: float, top_p: float):
    """Whatever is asked, what is admitted can be served, and differs from the request in max_tokens alone."""
    asked = request(tokens, max_tokens, sampling=SamplingParams(temperature=temperature, top_p=top_p))
    possible = 0 < len(tokens) < 16 and all(0 <= t < 100 for t in tokens) and max_tokens > 0
    possible = possible and temperature >= 0 and 0 < top_p <= 1
    if not possible:
        refused(gate(), asked)
        return
    admitted = gate().admit(asked)
    assert 1 <= admitted.stop.max_tokens <= 16 - len(tokens)
    assert admitted.token_ids is asked.token_ids
    assert admitted.sampling is asked.sampling
