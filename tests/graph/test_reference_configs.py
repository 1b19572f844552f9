"""The configurations of the reference are understood exactly as they are printed there."""

import re
from pathlib import Path

import pytest

from core.components import engine_aliases
from core.graph import SettingError, load_plan, load_settings
from core.graph.config import Layer, load_text, override_tree, resolve

DATA = Path(__file__).parent / "data"
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def printed_blocks():
    """The YAML blocks of the document, by the name of their section."""
    text = (DATA / "deployment-modes.zh.md").read_text(encoding="utf-8")
    blocks = {"configs/agg.yaml": re.search(r"配置示例\n\n(.*?)\n启动命令", text, re.DOTALL).group(1)}
    for number in ("7.1", "7.2", "7.3"):
        pattern = rf"^{re.escape(number)} [^\n]*\n\n(.*?)\n(?:\d\.|\d\. |7\.\d )"
        blocks[number] = re.search(pattern, text, re.DOTALL | re.MULTILINE).group(1)
    return blocks


def understood(text, *overrides):
    plan = load_plan("graphs.agg")
    layers = [override_tree(overrides), load_text(text, "reference", Layer.FILE)]
    return resolve(plan.catalogue, layers, engine_aliases([])).services


def test_the_document_has_the_blocks_this_test_is_about():
    blocks = printed_blocks()
    assert len(blocks) == 4
    assert all(re.search(r"^(VllmWorker|Processor|Frontend|PrefillWorker):", b, re.MULTILINE) for b in blocks.values())


def test_the_aggregated_configuration():
    services = understood(printed_blocks()["configs/agg.yaml"])
    frontend, processor, worker = (services[n].config for n in ("Frontend", "Processor", "Worker"))
    assert (frontend.served_model_name, frontend.endpoint, frontend.port) == (
        MODEL, "dynamo.Processor.chat/completions", 8000,
    )  # fmt: skip
    assert (processor.model, processor.block_size, processor.router) == (MODEL, 64, "round-robin")
    assert (worker.engine, worker.model, worker.block_size) == ("vllm", MODEL, 64)
    assert (worker.enable_prefix_caching, worker.tensor_parallel_size) == (True, 1)
    assert worker.served_model_name == MODEL
    assert (services["Worker"].args.workers, services["Worker"].args.resources.gpus) == (1, 1)


def test_it_can_be_served_as_the_document_says(tmp_path):
    file = tmp_path / "agg.yaml"
    file.write_text(printed_blocks()["configs/agg.yaml"], encoding="utf-8")
    settings = load_settings(load_plan("graphs.agg:Frontend"), file=file, aliases=engine_aliases([]), environment={})
    assert settings.services["Worker"].config.engine == "vllm"


def test_the_snippets_on_good_practice():
    blocks = printed_blocks()
    worker = understood(blocks["7.1"])["Worker"].config
    assert (worker.engine, worker.enable_prefix_caching, worker.tensor_parallel_size) == ("vllm", True, 1)
    processor = understood(blocks["7.2"])["Processor"].config
    assert (processor.router, processor.kv_hit_weight, processor.load_weight) == ("kv", 1.0, 0.5)
    services = understood(blocks["7.3"])
    assert services["Worker"].config.enable_disaggregated_prefill is True
    assert services["PrefillWorker"].config.engine == "vllm"
    assert (services["PrefillWorker"].args.workers, services["PrefillWorker"].args.resources.gpus) == (2, 1)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("7.2", "Processor.router is 'kv', which needs a Router, and graphs.agg has only"),
        ("7.3", "Worker.enable-disaggregated-prefill is True, which needs a PrefillWorker"),
    ],
)
def test_a_key_of_another_mode_is_refused_where_it_would_do_nothing(tmp_path, block, sentence):
    file = tmp_path / "x.yaml"
    text = printed_blocks()[block]
    file.write_text(text.split("PrefillWorker:")[0], encoding="utf-8")
    with pytest.raises(SettingError) as caught:
        load_settings(load_plan("graphs.agg"), file=file, aliases=engine_aliases([]), environment={})
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{file}:3: ")


@pytest.mark.parametrize("mode", ["agg", "agg_router", "disagg", "disagg_router"])
def test_the_configurations_of_the_original_sdk(mode):
    services = understood((DATA / "sdk" / f"{mode}.yaml").read_text())
    worker = services["Worker"].config
    assert (worker.engine, worker.model, worker.block_size, worker.max_model_len) == ("vllm", MODEL, 64, 16384)
    assert services["Worker"].args.resources.gpus == 1
    if "router" in mode:
        assert services["Processor"].config.router == "kv"
        assert services["Router"].config.min_workers == 1
    if mode.startswith("disagg"):
        assert (worker.remote_prefill, worker.conditional_disagg) == (True, True)
        assert (worker.max_local_prefill_length, worker.max_prefill_queue_size) == (10, 2)
        assert services["PrefillWorker"].config.kv_transfer_config == {"kv_connector": "DynamoNixlConnector"}


def test_engines_are_mixed_and_selected_on_the_command_line():
    mixed = understood("Worker: {}", ("PrefillWorker.engine", "vllm"), ("Worker.engine", "torch"))
    assert (mixed["Worker"].config.engine, mixed["PrefillWorker"].config.engine) == ("torch", "vllm")
    same = understood("SglangWorker: {}")
    assert (same["Worker"].config.engine, same["PrefillWorker"].config.engine) == ("sglang", "sglang")
    assert {"TrtllmWorker", "TorchWorker", "MyEngineWorker"} <= set(engine_aliases(["my-engine"]))


def test_the_shipped_configuration_fits_the_shipped_graph():
    from core.resources import shipped

    settings = load_settings(
        load_plan("graphs.agg"), file=shipped("configs/agg.yaml"), aliases=engine_aliases([]), environment={}
    )
    assert settings.services["Worker"].config.engine == "torch"
    assert settings.unused_common == ()
