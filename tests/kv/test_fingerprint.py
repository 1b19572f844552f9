"""Which differences between two workers' KV are refused, and how the refusal reads."""

from __future__ import annotations

import pytest

from core.kv.fingerprint import (
    FingerprintMismatch,
    build_fingerprint,
    compare,
    identify_model,
    require_match,
    rope_text,
)
from core.kv.layout import KvLayout
from core.messages import ConfigError, EngineError

LAYOUT = KvLayout(layers=2, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16")


def fingerprint(layout=LAYOUT, **changes):
    fields = {"model": "m", "rope": "{}", "engine": "torch", "engine_version": "1"} | changes
    return build_fingerprint(layout, **fields)


def test_equal_fingerprints_match():
    require_match(fingerprint(), fingerprint(), canonical=False)


def test_canonical_blocks_may_differ_in_what_can_be_converted():
    other = KvLayout(
        layers=2, kv_heads=4, head_size=8, block_size=32, dtype="bfloat16", dims="HNKD", tp_size=2, tp_rank=1
    )
    theirs = fingerprint(other, engine="vllm", engine_version="2", extra={"connector": "x"})
    require_match(fingerprint(), theirs, canonical=True)
    assert {m.field for m in compare(fingerprint(), theirs, canonical=False)} == {
        "block_size",
        "dims",
        "tp_size",
        "engine",
        "engine_version",
        "connector",
    }


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("model", fingerprint(model="n")),
        ("rope", fingerprint(rope='{"rope_theta":1}')),
        ("dtype", fingerprint(KvLayout(layers=2, kv_heads=4, head_size=8, block_size=16, dtype="float32"))),
        ("layers", fingerprint(KvLayout(layers=3, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16"))),
        ("kv_heads", fingerprint(KvLayout(layers=2, kv_heads=2, head_size=8, block_size=16, dtype="bfloat16"))),
        ("head_size", fingerprint(KvLayout(layers=2, kv_heads=4, head_size=4, block_size=16, dtype="bfloat16"))),
        ("parts", fingerprint(KvLayout(layers=2, kv_heads=4, head_size=8, block_size=16, dtype="bfloat16", parts=1))),
    ],
)
def test_what_decides_the_numbers_must_be_equal_even_for_canonical_blocks(field, changed):
    with pytest.raises(FingerprintMismatch) as caught:
        require_match(fingerprint(), changed, canonical=True, our_name="decode-0", their_name="prefill-1")
    assert [m.field for m in caught.value.mismatches] == [field]
    text = str(caught.value)
    assert f"{field} is {fingerprint()[field]!r} on decode-0" in text
    assert f"{changed[field]!r} on prefill-1" in text


def test_a_mismatch_is_both_a_configuration_and_a_request_error():
    with pytest.raises(ConfigError) as caught:
        require_match(fingerprint(), fingerprint(model="n"), canonical=True)
    assert isinstance(caught.value, EngineError)
    assert not caught.value.retryable


def test_a_field_that_is_not_stated_is_not_trusted():
    theirs = fingerprint()
    del theirs["rope"]
    with pytest.raises(FingerprintMismatch, match=r"rope is .* on this worker and not stated on the other worker"):
        require_match(fingerprint(), theirs, canonical=True)
    with pytest.raises(FingerprintMismatch, match="model is not stated"):
        require_match({}, {}, canonical=True)


def test_an_engine_cannot_redefine_a_field():
    with pytest.raises(ValueError, match="has a field 'dtype' already"):
        fingerprint(extra={"dtype": "x"})


def test_a_checkpoint_is_named_by_content_not_by_path(tmp_path):
    for name in ("a", "b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x" * 300_000)
    changed = bytearray(b"x" * 300_000)
    changed[-1] = 0
    (tmp_path / "c" / "model.safetensors").write_bytes(changed)
    names = [identify_model(tmp_path / name) for name in ("a", "b", "c")]
    assert names[0] == names[1] != names[2]
    with pytest.raises(FileNotFoundError):
        identify_model(tmp_path)


def test_rope_text_is_the_same_for_the_same_settings():
    old = rope_text({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}, "hidden_size": 8})
    assert old == rope_text({"rope_scaling": {"factor": 2, "type": "linear"}, "rope_theta": 1e4, "layers": 3})
    assert old != rope_text({"rope_theta": 1e5, "rope_scaling": {"factor": 2, "type": "linear"}})
    assert rope_text({"rope_parameters": {"rope_theta": 1e4}}) == rope_text({"rope_theta": 1e4})
