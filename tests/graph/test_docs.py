"""What the pages for operators and graph authors show is what works."""

import re
import sys
import types
from pathlib import Path

import pytest

from core.graph import Deployment, load_plan, load_settings, plan
from core.graph.config import Layer, load_text, resolve
from core.graph.links import Graph
from core.runtime import LocalRuntime

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def module(monkeypatch):
    """A module made of some text, as an import would make it."""

    def make(name, text):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(text, vars(module))
        return module

    return make


def test_the_graph_in_serve_is_the_shipped_one(module):
    text = next(block for block in blocks("serve.md", "python") if "Frontend.link" in block)
    assert plan(Graph.of(module("shown", text))).nodes.keys() == load_plan("graphs.agg").nodes.keys()


async def test_the_services_in_serve_run(module, capsys):
    text = next(block for block in blocks("serve.md", "python") if "class Shout" in block)
    shown = module("shouting", text)
    served = plan(Graph("shouting"), shown.Greeter)
    settings = load_settings(served, overrides=[("Shout.mark", "?")], environment={})
    async with Deployment(served, settings, LocalRuntime()) as deployment:
        assert len(deployment.replicas("Shout")) == 2
    assert capsys.readouterr().out == "HELLO?\nTHERE?\n"


def test_the_configuration_in_configure_is_understood():
    (text,) = blocks("configure.md", "yaml")
    services = resolve(load_plan("graphs.agg").catalogue, [load_text(text, "configure.md", Layer.FILE)]).services
    assert services["Worker"].config.model == "Qwen/Qwen3-0.6B"
    assert services["Worker"].config.engine_args
    assert services["Worker"].args.workers == 2
