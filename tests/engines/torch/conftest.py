"""Tiny models with random weights, made once a session, and a way to run the engine on them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from core.engine import EngineHost, EngineRegistry, Source
from core.messages import Constraint, Delta, EngineConfig, EngineRequest, Role, SamplingParams, StopConditions
from engines.torch import TorchEngine

VOCAB = 320
EOS = 1
GREEDY = SamplingParams(temperature=0)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "gpt2": ("GPT2Config", {"n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
}

torch.set_num_threads(1)  # the machine is shared, and a step of these models is too small to divide


def save_model(folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Writes a model of the family, the same weights every time, with a tokenizer whose text is legible."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **extra})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, **save)
    tokenizer = make_tokenizer()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(
        folder
    )
    return folder


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: every text can be spelt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran after the red fox " * 3], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_of(family)` is that family's folder."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def llama(model_of: Callable[[str], Path]) -> Path:
    return model_of("llama")


@pytest.fixture(scope="session")
def reference(model_of: Callable[[str], Path]) -> Callable[[str], Any]:
    """`reference(family)` is the same model as transformers runs it."""
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = transformers.AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32)
        return loaded[family]

    return get


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by `transformers.generate`."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


class Running:
    """A started engine and shorthands for asking it."""

    def __init__(self, host: EngineHost, engine: TorchEngine) -> None:
        self.host = host
        self.engine = engine
        self._ids = itertools.count()

    def request(
        self,
        prompt: list[int],
        count: int = 8,
        sampling: SamplingParams = GREEDY,
        *,
        stop: StopConditions | None = None,
        constraint: Constraint | None = None,
        **rest: Any,
    ) -> EngineRequest:
        """A request for exactly `count` tokens, as `generate` below, unless `stop` is given."""
        rest.setdefault("request_id", f"r{next(self._ids)}")
        stop = stop or StopConditions(max_tokens=count, min_tokens=count)
        return EngineRequest(token_ids=prompt, sampling=sampling, stop=stop, constraint=constraint, **rest)

    async def deltas(self, request: EngineRequest) -> list[Delta]:
        """All of a request's deltas; asserts that the last one, and only that one, is terminal."""
        found = [delta async for delta in self.host.decode(request)]
        assert [delta.finish is not None for delta in found] == [False] * (len(found) - 1) + [True]
        return found

    async def tokens(
        self, prompt: list[int], count: int = 8, sampling: SamplingParams = GREEDY, **rest: Any
    ) -> list[int]:
        """The tokens generated."""
        deltas = await self.deltas(self.request(prompt, count, sampling, **rest))
        return [token for delta in deltas for token in delta.token_ids]

    async def idle(self) -> None:
        """Asserts that nothing is left behind: no request, no block."""
        await self.until(lambda: self.load.running + self.load.waiting == 0)
        assert self.load.kv_blocks_used == 0
        assert self.load.tokens_in_flight == 0
        await self.engine.check_integrity()

    @property
    def load(self) -> Any:
        return self.host.load()[0]

    async def until(self, condition: Callable[[], bool]) -> None:
        """See `until`."""
        await until(condition)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Returns when the condition holds; fails when it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's doing
            await asyncio.sleep(0.002)


Engine = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def engine() -> Engine:
    """`async with engine(folder, **config) as running:`; leaving it asserts that the engine is clean and stops it."""

    @asynccontextmanager
    async def run(folder: Path, **config: Any) -> AsyncIterator[Running]:
        made: list[TorchEngine] = []

        def create() -> TorchEngine:
            made.append(TorchEngine())
            return made[-1]

        adapter = EngineRegistry([]).add(create, Source("torch", "tests"))
        defaults = {"dtype": "float32", "device": "cpu", "num_kv_blocks": 64, "engine_args": {"threads": 1}}
        host = EngineHost(adapter, EngineConfig(model=str(folder), **{**defaults, **config}), Role.AGGREGATED)
        async with host:
            yield Running(host, made[-1])

    return run


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
    return found
