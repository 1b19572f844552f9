"""What a policy is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence

from core.kv import prompt_hashes


class Query:
    """One request to route. The prompt is hashed when a policy first looks at it, once."""

    __slots__ = (
        "_hashes",
        "block_size",
        "cache_salt",
        "hash_seconds",
        "lora",
        "priority",
        "request_id",
        "session",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        block_size: int,
        lora: str | None = None,
        cache_salt: str | None = None,
        session: str | None = None,
        priority: int = 0,
        hashes: Sequence[int] | None = None,
    ) -> None:
        """`hashes`: the prompt's block hashes when they are known already."""
        self.request_id = request_id
        self.token_ids = token_ids
        self.block_size = block_size
        self.lora = lora
        self.cache_salt = cache_salt
        self.session = session
        self.priority = priority
        self.hash_seconds = 0.0
        """Time that hashing took; 0 until then."""
        self._hashes = hashes

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.token_ids)

    @property
    def hashes(self) -> Sequence[int]:
        """Chained hashes of the prompt's full blocks. Raises `RequestRejected` for ids that are no token ids."""
        if self._hashes is None:
            start = time.perf_counter()
            self._hashes = prompt_hashes(self.token_ids, self.block_size, lora=self.lora, cache_salt=self.cache_salt)
            self.hash_seconds = time.perf_counter() - start
        return self._hashes
