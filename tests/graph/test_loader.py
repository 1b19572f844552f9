"""Finding graphs by the names that users type."""

import sys

import pytest

from core.graph import GraphError, known_graphs, load_plan


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory whose modules are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    path = list(sys.modules["graphs"].__path__) if "graphs" in sys.modules else None
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    if path is not None:
        sys.modules["graphs"].__path__ = path


def test_a_shipped_graph_is_found_from_any_directory(folder):
    assert list(load_plan("graphs.agg", folder).nodes) == ["Worker", "Processor", "Frontend"]
    assert list(load_plan("graphs.agg:Processor", folder).nodes) == ["Worker", "Processor"]


def test_a_graph_of_the_working_directory_is_found_beside_the_shipped_ones(folder):
    (folder / "graphs").mkdir()
    (folder / "graphs" / "mine.py").write_text("from dynamo import Processor, Worker\nProcessor.link(Worker)\n")
    assert list(load_plan("graphs.mine", folder).nodes) == ["Worker", "Processor"]
    assert "graphs.mine" in known_graphs(folder)
    assert load_plan("graphs.agg", folder).entry == "Frontend"


def test_the_only_service_of_a_module_is_its_entry(folder):
    (folder / "lonely.py").write_text(
        "from dynamo import Service, service\n@service()\nclass Alone(Service):\n    pass\n"
    )
    assert load_plan("lonely", folder).entry == "Alone"


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("graphs.agq", "Unknown graph 'graphs.agq'; did you mean graphs.agg"),
        ("nothing_like_it", "Unknown graph 'nothing_like_it'; known are .*graphs.agg"),
        ("graphs.agg:Fronted", "no service 'Fronted'; did you mean Frontend"),
        ("graphs/agg.py", "is not a graph module; write it as Python imports it"),
        ("broken", "Graph broken is not valid Python"),
        ("needy", "Graph needy imports 'no_such_package_here', which is not installed"),
        ("failing", "could not be imported: ZeroDivisionError"),
        ("empty", "empty has no services"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(folder, target, complaint):
    (folder / "broken.py").write_text("Frontend.link(\n")
    (folder / "needy.py").write_text("import no_such_package_here\n")
    (folder / "failing.py").write_text("1 / 0\n")
    (folder / "empty.py").write_text("x = 1\n")
    with pytest.raises(GraphError, match=complaint):
        load_plan(target, folder)
