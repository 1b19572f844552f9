"""Commands that end by themselves: help, engines, graph, dry runs, and one sentence for every mistake."""

import json
import socket
import subprocess
import sys

import pytest


def test_without_a_command_there_is_help_and_the_code_of_a_mistake(here):
    shown = here()
    assert shown.returncode == 2
    assert shown.stderr.startswith("Usage: dynamo [OPTIONS] COMMAND")


def test_help_and_version(here):
    done = here("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("serve", "engines", "graph"))
    assert here("--version").stdout.startswith("dynamo, version 0.")
    assert "--Service.key=value" in here("serve", "--help").stdout


class TestEngines:
    def test_every_adapter_is_listed_with_its_facts(self, here):
        done = here("engines", "--json")
        listed = {engine["name"]: engine for engine in json.loads(done.stdout)["engines"]}
        assert {"puppet", "absent"} <= set(listed)
        puppet, absent = listed["puppet"], listed["absent"]
        assert (puppet["available"], puppet["modes"], puppet["plugin"]) == (
            True,
            ["agg", "agg_router"],
            "puppet-engine",
        )
        assert (absent["available"], absent["version"], absent["tested"]) == (False, None, ">=1")
        assert "pip install absent" in absent["unavailable"]

    def test_a_broken_plug_in_is_listed_with_its_sentence(self, here):
        (broken,) = json.loads(here("engines", "--json").stdout)["broken"]
        assert (broken["name"], broken["package"]) == ("broken", "puppet-engine")
        assert "start_engin" in broken["error"]

    def test_the_text_says_the_same(self, here):
        text = here("engines").stdout
        assert "absent  not available" in text
        assert "why not     package 'no-such-package' is not installed" in text
        assert "broken  refused" in text

    def test_listing_imports_no_engine_and_no_server(self, user_environment):
        script = (
            "import sys; from core.cli import main; code = main(['engines']); "
            "heavy = {'torch', 'transformers', 'vllm', 'sglang', 'tensorrt_llm', 'fastapi', 'core.components'}; "
            "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=user_environment()
        )
        assert done.returncode == 0
        assert done.stderr.strip() == "[]"


class TestGraph:
    def test_text_and_mermaid(self, here):
        assert here("graph", "graphs.agg").stdout.splitlines()[1].startswith("Frontend")
        assert "Processor --> Worker" in here("graph", "graphs.agg", "--mermaid").stdout

    def test_keys_come_with_type_default_and_meaning(self, here):
        text = here("graph", "graphs.agg", "--keys").stdout
        assert "  max-model-len: a whole number of at least 1 or null; default null" in text
        assert "Longest sequence, prompt and output together" in text
        assert "worker-id" not in text


class TestDryRun:
    def test_each_value_has_its_origin(self, here):
        (here.folder / "my.yaml").write_text("VllmWorker:\n  block-size: 32\n")
        done = here("serve", "graphs.agg", "-f", "my.yaml", "--dry-run", "--Worker.ServiceArgs.workers=2")
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines()]
        assert ["block-size", "32", "my.yaml:2"] in rows
        assert ["block-size", "32", "as", "Worker.block-size,", "my.yaml:2"] in rows
        assert ["engine", '"vllm"', "my.yaml:1"] in rows
        assert ["ServiceArgs.workers", "2", "--Worker.ServiceArgs.workers"] in rows
        assert ["port", "8000", "default"] in rows

    def test_json(self, here):
        done = here("serve", "graphs.agg:Processor", "--dry-run=json", "--engine", "puppet")
        document = json.loads(done.stdout)
        assert document["services"]["Worker"]["engine"] == {
            "value": "puppet",
            "origin": "--engine",
            "layer": "shortcut",
        }
        assert set(document["services"]) == {"Worker", "Processor"}

    def test_the_environment_is_a_layer(self, here):
        done = here("serve", "graphs.agg", "--dry-run", DYN_DEPLOYMENT_CONFIG="Worker:\n  model: m\n")
        assert "DYN_DEPLOYMENT_CONFIG:2" in done.stdout

    def test_a_shipped_configuration_is_found_from_an_empty_directory(self, here):
        done = here("serve", "graphs.agg", "-f", "configs/agg.yaml", "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "Common," in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sevre"], "No such command 'sevre'; did you mean serve?"),
        (["serve"], "Missing argument 'GRAPH'"),
        (["serve", "graphs.agq"], "Unknown graph 'graphs.agq'; did you mean graphs.agg"),
        (["serve", "graphs.agg:Fronted"], "no service 'Fronted'; did you mean Frontend?"),
        (["serve", "graphs.agg", "--engine", "tensort"], "Unknown engine 'tensort'"),
        (["serve", "graphs.agg", "--engine", "pupet"], "did you mean puppet?"),
        (["serve", "graphs.agg", "--engine", "absent"], "install it with: pip install absent"),
        (["serve", "graphs.agg", "--engine", "broken"], "'start_engin' is not a hook; did you mean 'start_engine'?"),
        (["serve", "graphs.agg", "--engine", "a", "--engine", "b"], "--engine is given 2 times (a and b); keep one."),
        (["serve", "graphs.agg", "-f", "nowhere.yaml"], "Configuration file nowhere.yaml does not exist"),
        (["serve", "graphs.agg", "-f", "bad.yaml"], "bad.yaml:3: not YAML: "),
        (["serve", "graphs.agg", "--Wroker.model=x"], "--Wroker.model: unknown service 'Wroker'; did you mean Worker"),
        (["serve", "graphs.agg", "--Worker.modle=x"], "Worker has no key 'modle'; did you mean model?"),
        (["serve", "graphs.agg", "--Worker.model"], "--Worker.model has no value; write --Worker.model=VALUE."),
        (["serve", "graphs.agg", "--Frontend.port=http"], "must be a whole number of at least 0 and of at most 65535"),
        (["serve", "graphs.agg", "--Processor.router=kv"], "needs a Router, and graphs.agg has only"),
        (["serve", "graphs.agg", "--model", "./half", "--engine", "torch"], "has no tokenizer"),
        (["serve", "graphs.agg", "--model", "./none"], "does not exist"),
        (["serve", "graphs.agg", "--port", "x"], "'x' is not a valid integer"),
        (["serve", "graphs.agg", "--enigne", "x"], "Did you mean"),
        (["graph", "graphs.nope"], "Unknown graph 'graphs.nope'"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(here, arguments, sentence):
    (here.folder / "bad.yaml").write_text("Worker:\n  model: [1\n")
    (here.folder / "half").mkdir()
    done = here(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("Error: ")
    assert rest == [] or ("not YAML" in first and rest[-1].strip() == "^")


def test_a_port_that_is_taken_is_noticed_before_anything_is_loaded(here):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = here("serve", "graphs.agg", "--engine", "puppet", f"--Frontend.port={port}")
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
    assert "--Frontend.port" in done.stderr
    assert "Worker" not in done.stderr


def test_an_engine_that_refuses_the_configuration_says_what_to_lower(dynamo):
    refuse = "--Worker.engine-args.refuse=The KV cache needs 9 GB and 3 GB are free; lower num-kv-blocks."
    done = dynamo("serve", "graphs.agg", "--engine", "puppet", "--port", "0", refuse)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "Error: The KV cache needs 9 GB and 3 GB are free; lower num-kv-blocks."


def test_a_graph_of_the_working_directory_is_served_from_there(here):
    (here.folder / "mine.py").write_text("from dynamo import Processor, Worker\n\nProcessor.link(Worker)\n")
    done = here("graph", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "mine",
        "Processor  [chat/completions, completions, tokenize, detokenize, models, ready, explain_route, routing_state]",
    ]


def test_a_mistake_is_one_line_from_a_real_process_too(dynamo):
    done = dynamo("serve", "graphs.agg", "--engine", "pupet")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "Error: --engine: Unknown engine 'pupet'; did you mean puppet? "
        "'dynamo engines' lists them with what each needs.\n"
    )
