"""What `EngineConfig` does for adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.messages import ConfigError, EngineConfig


def test_tokenizer_file(tmp_path: Path):
    """The tokenizer is the model's, unless another folder is named."""
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, other):
        (folder / "tokenizer.json").write_text("{}")
    assert EngineConfig(model=str(tmp_path)).tokenizer_file() == tmp_path / "tokenizer.json"
    assert EngineConfig(model=str(tmp_path), tokenizer=str(other)).tokenizer_file() == other / "tokenizer.json"


def test_no_tokenizer_file(tmp_path: Path):
    """Without a tokenizer the error tells an empty folder from a missing one."""
    with pytest.raises(ConfigError, match="the folder has none"):
        EngineConfig(model=str(tmp_path)).tokenizer_file()
    with pytest.raises(ConfigError, match="there is no such folder"):
        EngineConfig(model=str(tmp_path / "absent")).tokenizer_file()


def test_engine_args():
    """Arguments that the engine knows pass; another is refused with those like it."""
    config = EngineConfig(model="m", engine_args={"attention_backend": "x"})
    config.check_engine_args(["attention_backend", "seed"])
    with pytest.raises(ConfigError, match=r"no argument 'attention_backend'.*did you mean attention_backends\?"):
        config.check_engine_args(["attention_backends"])
    with pytest.raises(ConfigError, match="remove it"):
        config.check_engine_args(())
