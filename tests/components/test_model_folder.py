"""From what a user writes as `model` to a complete folder, or a sentence."""

import json
import struct

import pytest

from core.components.model_folder import check_model, display_name, resolve_model
from core.messages import ConfigError


def weights(path, size=8, missing=0):
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes((struct.pack("<Q", len(header)) + header + bytes(size))[: -missing or None])


@pytest.fixture
def folder(tmp_path):
    """A complete model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    weights(tmp_path / "model.safetensors")
    return tmp_path


def resolved(model, **more):
    return resolve_model(str(model), report=lambda text: None, **more)


def test_a_complete_folder_is_taken_as_it_is(folder):
    assert resolved(folder) == folder


def test_nothing_is_the_demo_model():
    assert resolved("").name == "demo"
    assert display_name("") == "demo"


def test_names(folder):
    assert display_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert display_name(str(folder)) == folder.name


def break_it(folder, how):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "cut off":
            weights(folder / "model.safetensors", missing=3)
        case "cut off in the header":
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{")
        case "empty":
            (folder / "model.safetensors").write_bytes(b"")
        case "no header":
            (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops" + bytes(20))
        case "shard missing":
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            weights(folder / "model-1.safetensors")
        case "bad index":
            (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no config", "has no config.json"),
        ("no tokenizer", "has no tokenizer"),
        ("no weights", r"has no \*.safetensors files"),
        ("cut off", "is cut off: .* bytes"),
        ("cut off in the header", "is cut off after 9 bytes"),
        ("empty", "is cut off after 0 bytes"),
        ("no header", "has no readable header"),
        ("shard missing", "1 of 2 weight files are missing, first model-2.safetensors"),
        ("bad index", "cannot be read"),
    ],
)
def test_an_incomplete_folder_is_refused(folder, how, sentence):
    break_it(folder, how)
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_model(str(folder))
    assert "fetch the model again" in str(caught.value)


def test_an_engine_without_weights_needs_only_a_tokenizer(folder):
    break_it(folder, "no weights")
    break_it(folder, "no config")
    assert resolved(folder, weights=False) == folder


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "~/no-such-folder-here"])
def test_a_missing_folder_is_named(model):
    with pytest.raises(ConfigError, match="does not exist"):
        check_model(model)


def test_what_is_neither_folder_nor_hub_id_is_refused():
    with pytest.raises(ConfigError, match="neither a folder here nor a hub id"):
        check_model("a b")
    check_model("Qwen/Qwen3-0.6B")


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: raises or gives what a test says, and records how it was asked."""
    import huggingface_hub

    asked = {}

    def answer_with(result):
        def snapshot_download(model, **more):
            asked.update(more, model=model)
            if isinstance(result, Exception):
                raise result
            with more["tqdm_class"](total=40_000_000, unit="B", unit_scale=True) as bar:
                for _ in range(40):
                    bar.update(1_000_000)
                    bar.refresh()
            return str(result)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer_with


def test_a_hub_id_is_fetched_without_what_is_not_needed(hub, folder):
    asked = hub(folder)
    assert resolved("some/model") == folder
    assert asked["model"] == "some/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    resolved("some/model", weights=False)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_an_offline_machine_is_told_in_a_sentence(hub):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for error in (LocalEntryNotFoundError("no"), OfflineModeIsEnabled("no"), ConnectionError("no")):
        hub(error)
        with pytest.raises(ConfigError, match=r"could not be fetched .*is there a network.*--Worker.model=FOLDER") as e:
            resolved("some/model")
        assert "\n" not in str(e.value)


def test_a_download_that_stopped_half_way_is_noticed(hub, folder):
    break_it(folder, "shard missing")
    hub(folder)
    with pytest.raises(ConfigError, match="weight files are missing"):
        resolved("some/model")


def test_a_download_shows_its_progress(hub, folder, capfd):
    hub(folder)
    said = []
    resolve_model("some/model", report=said.append)
    bars = [text for text in said if "fetching some/model [" in text]
    assert len(bars) in (20, 21)
    assert bars[-1] == f"fetching some/model [{'#' * 20}] 40 of 40 MB"
    assert capfd.readouterr().err == ""
