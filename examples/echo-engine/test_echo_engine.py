"""The whole contract, run on the echo engine: `pytest`. The model folder needs a tokenizer.json and nothing else."""

import os

from dynamo.testing import EngineConformance


class TestEcho(EngineConformance):
    engine = "echo"
    config = {"model": os.environ.get("MODEL", "models/demo"), "max_model_len": 512}  # noqa: RUF012
