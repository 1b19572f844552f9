"""Sends a prompt's KV into the room that waits for it, block by block while the rest of the prompt is computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from core.kv.lease import Deadline
from core.kv.transfer import CanonicalKv, TransferError
from engines.torch.kv_ranks import KvRanks
from engines.torch.stepper import Computed

logger = logging.getLogger("dynamo.engine.torch")


class Push:
    """The sending half of one push. Lives on the event loop; `stop` or `finish` must be awaited before it is let go."""

    def __init__(
        self,
        ranks: KvRanks,
        target: CanonicalKv,
        *,
        cached_tokens: int,
        seconds: float,
        unpin: Callable[[str], None],
    ) -> None:
        """`cached_tokens`: leading ones that the room has. Writes within `seconds` from now, and not later.

        `unpin` is called once for the pin of everything that is added.
        """
        self.target = target
        self.cached_tokens = cached_tokens
        self._ranks = ranks
        self._deadline = Deadline.after(seconds)
        self._unpin = unpin
        self._sent = cached_tokens
        self._blocks: list[int] = []
        self._waiting: list[Computed] = []
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def postpone(self, seconds: float) -> None:
        """Writes within `seconds` from now."""
        self._deadline = Deadline.after(seconds)

    def add(self, computed: Computed) -> None:
        """More blocks, following those before."""
        if self._stopped or computed.first != len(self._blocks):
            self._unpin(computed.pin)
            return
        self._blocks += computed.blocks
        self._waiting.append(computed)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send_waiting(), name=f"kv-push-{self.target.session}")

    async def stop(self, *, now: bool) -> None:
        """Return when nothing is being written: after what is on its way, or `now`, by breaking it off. Idempotent."""
        self._stopped = True
        self._drop_waiting()
        if self._task is not None and not self._task.done():
            if now:
                self._task.cancel()
            # Its outcome is no concern here: what was not sent is sent by `finish`.
            await asyncio.wait((self._task,))

    async def finish(self, blocks: list[int], num_tokens: int) -> None:
        """Send what the room still lacks of the whole prompt. Raises `TransferError`. Pre: stopped."""
        await self._send(blocks, num_tokens)

    async def _send_waiting(self) -> None:
        while self._waiting and not self._stopped:
            batch, self._waiting = self._waiting, []
            try:
                await self._send(self._blocks, len(self._blocks) * self._ranks.block_size)
            except TransferError as error:
                # `finish` tries once more, and raises what is wrong then.
                logger.warning("KV for '%s' could not be sent while it was computed: %s", self.target.session, error)
                self._stopped = True
                self._drop_waiting()
            finally:
                for computed in batch:
                    self._unpin(computed.pin)

    async def _send(self, blocks: list[int], upto: int) -> None:
        tokens = min(upto, self.target.num_tokens) - self._sent
        if tokens > 0:
            await self._ranks.push(self.target, blocks, first_token=self._sent, tokens=tokens, deadline=self._deadline)
            self._sent += tokens

    def _drop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for computed in waiting:
            self._unpin(computed.pin)
