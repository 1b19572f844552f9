"""Limits: what cannot be served is refused in a sentence, before the first delta, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo import Constraint, ConstraintKind, EngineRequest, RequestRejected
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.target import Target

SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.2,
    "seed": 1,
    "logit_bias": {1: 1.0},
    "bad_token_sequences": ((1,),),
}
"""A value other than the default for every sampling parameter."""


class Limits(Conformance):
    """Rules about requests that are refused."""

    @rule()
    async def test_impossible_prompts(self, target: Target) -> None:
        """Prompts that are empty, too long or outside the vocabulary are refused, and the next request is served."""
        info = target.host.info
        plain = (await target.generate([1, 2], 3)).tokens
        for prompt in ([], [-1], [1, info.vocab_size], [1] * info.max_model_len, [1] * (4 * info.max_model_len)):
            await self._refused(target, target.ask(prompt, 3))
        assert (await target.generate([1, 2], 3)).tokens == plain

    @rule()
    async def test_impossible_parameters(self, target: Target) -> None:
        """Parameters out of their range are refused."""
        wrong: list[dict[str, Any]] = [
            {"temperature": -0.1},
            {"temperature": float("nan")},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"top_k": -1},
            {"min_p": 1.0},
            {"presence_penalty": 2.1},
            {"repetition_penalty": 0.0},
            {"logit_bias": {target.host.info.vocab_size: 1.0}},
        ]
        for fields in wrong:
            await self._refused(target, target.ask([1, 2], 3, **fields))
        for count in (0, -1):
            await self._refused(target, target.ask([1, 2], count))

    @rule()
    async def test_undeclared_is_refused(self, target: Target) -> None:
        """What the capabilities do not declare is refused, never ignored."""
        can = target.can
        asked: list[dict[str, Any]] = [{field: SAMPLING[field]} for field in SAMPLING.keys() - can.sampling]
        asked += [{"constraint": Constraint(kind, "[]")} for kind in set(ConstraintKind) - can.constraints]
        asked += [{name: 1} for name in ("logprobs", "prompt_logprobs", "priority") if not getattr(can, name)]
        asked += [] if can.lora else [{"lora": "any"}]
        asked += [] if can.data_parallel else [{"data_parallel_rank": 1}]
        for fields in asked:
            await self._refused(target, target.ask([1, 2], 3, **fields))

    @rule("lora")
    async def test_unknown_lora(self, target: Target) -> None:
        """A LoRA adapter that is not loaded is refused by name."""
        await self._refused(target, target.ask([1, 2], 3, lora="no-such-adapter"))

    async def _refused(self, target: Target, request: EngineRequest) -> None:
        async with target.stream(request) as stream:
            try:
                await stream.next()
            except RequestRejected as error:
                refusal = str(error)
            else:
                pytest.fail(f"served and not refused: {request}")
            assert len(refusal) > 20, f"the refusal says too little: {refusal!r}"
