"""Mistakes that a user makes with a model folder or a setting: one sentence each, and nothing left running."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.messages import ConfigError
from tests.engines.torch.conftest import SIZES, Engine, prompt_of, save_model


@pytest.fixture
def folder(tmp_path: Path, llama: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


async def refusal(engine: Engine, folder: Path, **config: Any) -> str:
    """The error's text: one line. The engine must not start."""
    with pytest.raises(ConfigError) as error:
        async with engine(folder, **config):
            pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("torch-engine")]
    text = str(error.value)
    assert "\n" not in text
    return text


def truncate(path: Path) -> None:
    """As an interrupted download leaves it."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config cut off": (lambda f: truncate(f / "config.json"), "config.json.* cannot be used"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "weights cut off": (lambda f: truncate(f / "model.safetensors"), "damaged or half-downloaded"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or half-downloaded"),
    "unknown type": (lambda f: edit(f, model_type="nonsense", architectures=["X"]), "cannot be used"),
    "too few tensors": (lambda f: edit(f, num_hidden_layers=3), "tensors are missing"),
    "other shapes": (lambda f: edit(f, intermediate_size=128), "another shape|cannot be used|do not fit"),
}


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("mistake", SPOILT)
async def test_spoilt_folders(mistake: str, folder: Path, engine: Engine) -> None:
    """Each is named, with the file."""
    spoil, expected = SPOILT[mistake]
    spoil(folder)
    text = await refusal(engine, folder)
    assert re.search(expected, text), text
    assert str(folder) in text


async def test_spoilt_shards(tmp_path: Path, engine: Engine) -> None:
    """A shard that the index names and that is absent or cut off; an index that is no JSON."""
    folder = save_model(tmp_path / "sharded", "llama", max_shard_size="60KB")
    last = max(folder.glob("model-*.safetensors"))
    truncate(last)
    assert last.name in await refusal(engine, folder)
    last.unlink()
    assert f"{last.name} of" in await refusal(engine, folder)
    truncate(folder / "model.safetensors.index.json")
    assert "index.json is damaged" in await refusal(engine, folder)


def make(folder: Path, name: str, **extra: Any) -> Path:
    """A model of another architecture."""
    config = getattr(transformers, name)(**extra)
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    return folder


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder-decoder": (
        "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8},
        "encoder-decoder",
    ),
    "state space": (
        "MambaConfig",
        {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "plain attention|logits|plain keys",
    ),
    "sinks": (
        "GptOssConfig",
        {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2},
        "attention sinks",
    ),
    "latent attention": (
        "DeepseekV3Config",
        {
            **SIZES,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 4,
        },
        "MLA",
    ),
    "position bias": (
        "BloomConfig",
        {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        "plain|logits|attention",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
async def test_architectures_that_cannot_run(kind: str, tmp_path: Path, engine: Engine) -> None:
    """They are refused at start, by what they are."""
    name, extra, expected = UNSUPPORTED[kind]
    text = await refusal(engine, make(tmp_path / "model", name, **extra))
    assert "cannot run" in text
    assert re.search(expected, text), text


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 0}, "block-size is 0"),
    ({"max_num_seqs": -1}, "max-num-seqs is -1"),
    ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, "raise max-num-batched-tokens to 8"),
    ({"num_kv_blocks": 4, "max_model_len": 128}, "lower max-model-len to 64"),
    ({"num_kv_blocks": None, "kv_cache_memory": 100}, "kv-cache-memory"),
    ({"max_model_len": 5000}, "longest sequence is 1024"),
    ({"gpu_memory_utilization": 1.5}, "gpu-memory-utilization is 1.5"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"device": "cuda:99"}, "cuda:99.*visible"),
    ({"tensor_parallel_size": 2}, "tensor-parallel-size"),
    ({"lora_modules": {"x": "y"}}, "lora-modules"),
    ({"engine_args": {"thread": 2}}, "did you mean threads"),
    ({"engine_args": {"threads": "many"}}, "threads is 'many'"),
]


@pytest.mark.parametrize(("config", "expected"), SETTINGS)
async def test_settings_that_cannot_work(config: dict[str, Any], expected: str, llama: Path, engine: Engine) -> None:
    """Each says what was found and what to change."""
    text = await refusal(engine, llama, **config)
    assert re.search(expected, text), text


async def test_memory_settings_are_honoured(llama: Path, engine: Engine) -> None:
    """Blocks by number, by bytes, and by default no more than full sequences can fill; the length follows."""
    per_block = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, head size, tokens, bytes
    async with engine(llama, num_kv_blocks=5) as running:
        assert (running.host.info.num_kv_blocks, running.host.info.max_model_len) == (5, 80)
    async with engine(llama, num_kv_blocks=None, kv_cache_memory=10 * per_block + 7) as running:
        assert running.host.info.num_kv_blocks == 10
    async with engine(llama, num_kv_blocks=None, max_num_seqs=3, max_model_len=100) as running:
        assert running.host.info.num_kv_blocks == 3 * 7
        assert running.host.info.max_model_len == 100


async def test_the_longest_sequence_fits(llama: Path, engine: Engine) -> None:
    """A prompt one token short of the limit runs; output ends at the model's length, whatever was asked for."""
    async with engine(llama, num_kv_blocks=5) as running:
        assert len(await running.tokens(prompt_of(79), 50)) == 1
        assert len(await running.tokens(prompt_of(60), 50)) == 20
        await running.idle()
