"""The contract, held by the built-in torch engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo.testing import EngineConformance
from engines.torch import TorchEngine


class TestTorch(EngineConformance):
    """On a tiny model with random weights, whose next token is anything but certain."""

    engine = TorchEngine
    other_layouts = (
        {"engine_args": {"kv_layout": "HND"}},
        {"engine_args": {"kv_layout": "HND", "kv_shards": 2}, "block_size": 8},
    )

    @pytest.fixture(scope="class")
    @classmethod
    def engine_config(cls, tiny_model: Path) -> dict[str, object]:
        return {"model": str(tiny_model), "dtype": "float32", "device": "cpu", "max_model_len": 512, "block_size": 16}


class TestTorchDemo(EngineConformance):
    """On the model that is shipped: trained, with words for tokens."""

    engine = TorchEngine
    config = {"model": "models/demo", "dtype": "float32", "device": "cpu", "max_model_len": 512}  # noqa: RUF012
