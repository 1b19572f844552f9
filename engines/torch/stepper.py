"""One engine step: schedule, compute, sample, and say what became of each sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from core.messages import Delta, EngineError, FinishReason, TokenLogprob
from engines.torch.model import Runner
from engines.torch.sampler import Sampler, describe
from engines.torch.scheduler import Scheduler
from engines.torch.sequence import Sequence
from engines.torch.streams import merge

Outcomes = list[tuple[str, Delta | BaseException]]
"""What to hand to which request's stream, in order."""


class Computed(NamedTuple):
    """Full blocks of a prompt that is still being computed, pinned until `Holds.free(pin)`."""

    session: str
    first: int
    """Their place in the sequence."""
    blocks: list[int]
    pin: str


class Stepper:
    """Moves every running sequence on by a step. Owned by the engine thread."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler) -> None:
        self._runner = runner
        self.scheduler = scheduler
        self._sampler = sampler
        self.stalled = False
        """Whether the last step found no room for anything: nothing changes before a hold is freed."""
        self.computed: list[Computed] = []
        """What can be pushed since the list was last taken."""

    def step(self) -> Outcomes:
        """Computes one step. Pre: there is something to do. Any exception leaves the engine unusable."""
        chunks = self.scheduler.schedule()
        self.stalled = not chunks
        if self.stalled:
            return []
        ending = [chunk.sequence for chunk in chunks if chunk.size == chunk.sequence.num_left]
        logits, prompt_logits = self._runner.forward(chunks)
        for chunk, part in prompt_logits:
            _collect_prompt_logprobs(chunk.sequence, part)
        tokens, logprobs = self._sampler.sample(logits, ending)
        for chunk in chunks:
            self.scheduler.computed(chunk)
            if chunk.sequence.push and chunk.sequence.num_left:
                self._hand_out(chunk.sequence)
        outcomes: Outcomes = []
        for sequence, token, logprob in zip(ending, tokens, logprobs, strict=True):
            outcome = _append(sequence, token, logprob)
            if isinstance(outcome, BaseException):
                self.scheduler.finish(sequence)
            elif sequence.session is not None:
                self.scheduler.park(sequence, sequence.session)
            elif outcome.finish is not None:
                self.scheduler.finish(sequence)
            outcomes.append((sequence.request_id, outcome))
        return outcomes

    def resume(self, sequence: Sequence, session: str, first: Delta | None) -> Delta | EngineError | None:
        """Goes on behind the KV of a filled hold, and behind the token that came with it, exactly as if both had been
        computed here. Gives the stream's first delta; the sequence goes on unless that ends it. Without `first`
        nothing is given: the last prompt position is computed here.
        """
        hold = self.scheduler.holds.take(session)
        outcome: Delta | EngineError | None = None
        if first is not None:
            sequence.cached_tokens, sequence.prompt_logprobs = first.cached_tokens, first.prompt_logprobs
            outcome = _adopt(sequence, first)
        if outcome is None or (isinstance(outcome, Delta) and outcome.finish is None):
            self.scheduler.resume(sequence, hold)
        else:
            self.scheduler.pool.release(hold.table)
        return outcome

    def _hand_out(self, sequence: Sequence) -> None:
        full = sequence.num_computed // self.scheduler.pool.block_size
        first = sequence.num_pushed
        if full <= first:
            return
        assert sequence.session is not None
        blocks = sequence.block_table[first:full].tolist()
        pin = f"{sequence.session}/{first}"
        self.scheduler.holds.pin(pin, blocks)
        sequence.num_pushed = full
        self._runner.synchronize()
        self.computed.append(Computed(sequence.session, first, blocks, pin))


def _append(sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta | EngineError:
    sequence.token_ids.append(token)
    delta = sequence.first_delta(Delta([token], logprobs=None if logprob is None else [logprob]))
    try:
        complete = sequence.constrainer is not None and sequence.constrainer.advance(token)
    except EngineError as error:
        return error
    if token in sequence.sampling.stop_ids:
        delta.finish, delta.stop_token = FinishReason.STOP, token
    elif complete:
        delta.finish = FinishReason.STOP
    elif len(sequence.token_ids) >= sequence.end:
        delta.finish = FinishReason.LENGTH
    return delta


def _adopt(sequence: Sequence, first: Delta) -> Delta | EngineError:
    """Appends tokens that were generated elsewhere, as if they had been sampled here."""
    outcome: Delta | None = None
    for index, token in enumerate(first.token_ids):
        sequence.sampling.record(token)
        appended = _append(sequence, token, first.logprobs[index] if first.logprobs is not None else None)
        if isinstance(appended, EngineError):
            return appended
        outcome = appended if outcome is None else merge(outcome, appended)
        if outcome.finish is not None:
            break
    return outcome if outcome is not None else EngineError("A KV ticket came with a first delta without a token.")


@torch.inference_mode()
def _collect_prompt_logprobs(sequence: Sequence, logits: Tensor) -> None:
    """`logits` [m, V] predict the next m prompt tokens that have no log-probability yet."""
    collected = sequence.prompt_logprobs
    assert collected is not None
    if not len(logits):
        return
    following = sequence.token_ids[len(collected) : len(collected) + len(logits)]
    tokens = torch.tensor(following, device=logits.device)
    top = sequence.request.prompt_logprobs or 0
    collected += describe(torch.log_softmax(logits, dim=-1), tokens, [top] * len(following))
