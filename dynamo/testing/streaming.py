"""Streams: deltas, the terminal one, and that tokens depend on nothing but the request."""

from __future__ import annotations

import msgspec

from dynamo import Delta, FinishReason
from dynamo.testing.kit import Conformance
from dynamo.testing.rule import rule
from dynamo.testing.target import Target


class Streaming(Conformance):
    """Rules about what a stream carries."""

    @rule()
    async def test_exactly_max_tokens(self, target: Target) -> None:
        """A stream carries max_tokens tokens and ends with one terminal delta, the last, saying LENGTH."""
        for count in (1, 2, 17):
            run = await target.generate(target.prompt(9, "exact"), count)
            assert len(run.tokens) == count
            assert run.finish is FinishReason.LENGTH
            assert run.stop_token is None

    @rule()
    async def test_repeatable(self, target: Target) -> None:
        """The same greedy request gives the same tokens again."""
        prompt = target.prompt(21, "repeatable")
        first = await target.generate(prompt, 24)
        assert (await target.generate(prompt, 24)).tokens == first.tokens

    @rule()
    async def test_max_tokens_changes_nothing_else(self, target: Target) -> None:
        """A shorter answer is the beginning of the longer one."""
        prompt = target.prompt(15, "shorter")
        long = await target.generate(prompt, 24)
        assert (await target.generate(prompt, 7)).tokens == long.tokens[:7]

    @rule()
    async def test_batch_mates_change_nothing(self, target: Target) -> None:
        """Requests in a batch get the tokens that each gets alone."""
        requests = [(target.prompt(3 + 7 * i, f"mate {i}"), 8 + 3 * i) for i in range(8)]
        alone = [(await target.generate(prompt, count)).tokens for prompt, count in requests]
        batch = await target.together(target.ask(prompt, count) for prompt, count in requests)
        assert [run.tokens for run in batch] == alone

    @rule()
    async def test_continuation(self, target: Target) -> None:
        """A greedy sequence goes on after prior_tokens as if it had never been interrupted."""
        prompt = target.prompt(19, "continued")
        whole = (await target.generate(prompt, 20)).tokens
        for cut in (1, 7, 19):
            rest = await target.generate(prompt + whole[:cut], 20 - cut, prior_tokens=cut)
            assert rest.tokens == whole[cut:], f"resumed after {cut} tokens"

    @rule()
    async def test_one_token_prompt(self, target: Target) -> None:
        """The shortest prompt, one token, is served."""
        run = await target.generate(target.prompt(1, "shortest"), 5)
        assert len(run.tokens) == 5

    @rule()
    async def test_longest_sequence(self, target: Target) -> None:
        """A sequence can fill max_model_len to the last token, and ends there with LENGTH whatever max_tokens says."""
        length = target.host.info.max_model_len
        run = await target.generate(target.prompt(length - 5, "longest"), length)
        assert len(run.tokens) == 5
        assert run.finish is FinishReason.LENGTH
        last = await target.generate(target.prompt(length - 1, "longest"), 1)
        assert len(last.tokens) == 1

    @rule()
    async def test_deltas_travel(self, target: Target) -> None:
        """Deltas are plain data: they survive the wire unchanged."""
        more = {"logprobs": 2} if target.can.logprobs else {}
        run = await target.generate(target.prompt(5, "wire"), 4, **more)
        for delta in run.deltas:
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta) == delta

    @rule()
    async def test_unread_streams_block_nobody(self, target: Target) -> None:
        """A client that does not read its stream keeps nobody else waiting."""
        prompt = target.prompt(6, "unread")
        async with target.stream(target.ask(prompt, target.room(prompt))) as unread:
            await unread.next()
            await target.generate(target.prompt(7, "read"), 16)
