"""One engine step: schedule, compute, sample, and say what became of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from core.messages import Delta, EngineError, FinishReason, TokenLogprob
from engines.torch.model import Runner
from engines.torch.sampler import Sampler, describe
from engines.torch.scheduler import Scheduler
from engines.torch.sequence import Sequence

Outcomes = list[tuple[str, Delta | BaseException]]
"""What to hand to which request's stream, in order."""


class Stepper:
    """Moves every running sequence on by a step. Owned by the engine thread."""

    def __init__(self, runner: Runner, scheduler: Scheduler, sampler: Sampler) -> None:
        self._runner = runner
        self.scheduler = scheduler
        self._sampler = sampler

    def step(self) -> Outcomes:
        """Computes one step. Pre: there is something to do. Any exception leaves the engine unusable."""
        chunks = self.scheduler.schedule()
        ending = [chunk.sequence for chunk in chunks if chunk.size == chunk.sequence.num_left]
        logits, prompt_logits = self._runner.forward(chunks)
        for chunk, part in prompt_logits:
            _collect_prompt_logprobs(chunk.sequence, part)
        tokens, logprobs = self._sampler.sample(logits, ending)
        for chunk in chunks:
            self.scheduler.computed(chunk)
        outcomes: Outcomes = []
        for sequence, token, logprob in zip(ending, tokens, logprobs, strict=True):
            outcome = _append(sequence, token, logprob)
            if isinstance(outcome, BaseException) or outcome.finish is not None:
                self.scheduler.finish(sequence)
            outcomes.append((sequence.request_id, outcome))
        return outcomes


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
