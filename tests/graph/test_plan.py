"""From links to what is served: pruning, closure, order, and one sentence for every graph that cannot be served."""

import sys
import types
from itertools import pairwise

import pytest

from core.graph import Graph, GraphError, Service, depends, endpoint, plan, service
from core.graph.draw import as_mermaid, as_text


@service(abstract=True)
class Chooser(Service):
    pass


@service()
class Prefill(Service):
    pass


@service()
class Work(Service):
    prefill = depends(Prefill, optional=True)

    @endpoint()
    async def generate(self, request):
        yield request


@service()
class KvChooser(Chooser):
    work = depends(Work)


@service()
class Process(Service):
    chooser = depends(Chooser)
    work = depends(Work)


@service()
class Front(Service):
    process = depends(Process)


def edges(served):
    return {name: dict(node.dependencies) for name, node in served.nodes.items()}


def test_a_linked_service_keeps_only_its_linked_edges():
    with Graph.building("agg") as graph:
        Front.link(Process).link(Work)
    served = plan(graph)
    assert served.entry == "Front"
    assert edges(served) == {
        "Work": {"prefill": None},
        "Process": {"chooser": None, "work": "Work"},
        "Front": {"process": "Process"},
    }


def test_link_gives_its_target_and_dependencies_start_first():
    with Graph.building() as graph:
        assert Front.link(Process) is Process
        Process.link(KvChooser).link(Work).link(Prefill)
    assert list(plan(graph).nodes) == ["Prefill", "Work", "KvChooser", "Process", "Front"]


def test_a_linked_subclass_stands_for_the_abstract_service():
    with Graph.building() as graph:
        Front.link(Process).link(KvChooser).link(Work)
    assert edges(plan(graph))["Process"] == {"chooser": "KvChooser", "work": None}


def test_without_links_every_declared_edge_is_kept():
    assert edges(plan(Graph("g"), Work)) == {"Prefill": {}, "Work": {"prefill": "Prefill"}}


def test_an_entry_in_the_middle_serves_what_is_below_it():
    with Graph.building() as graph:
        Front.link(Process).link(Work)
    assert list(plan(graph, Process).nodes) == ["Work", "Process"]


def test_the_catalogue_has_everything_that_could_be_linked():
    with Graph.building() as graph:
        Front.link(Process).link(Work)
    assert set(plan(graph).catalogue) == {"Front", "Process", "Work", "Chooser", "Prefill"}


def refused(*chains, entry=None):
    with Graph.building("g") as graph:
        for chain in chains:
            for source, target in pairwise(chain):
                source.link(target)
    with pytest.raises(GraphError) as caught:
        plan(graph, entry)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_linking_to_an_undeclared_service_lists_what_is_declared():
    sentence = refused([Front, Work])
    assert "Front cannot be linked to Work" in sentence
    assert "it depends on Process" in sentence


def test_an_abstract_service_asks_for_a_concrete_one():
    sentence = refused([Front, Process, Chooser])
    assert "Chooser is abstract" in sentence
    assert "use link with a concrete implementation" in sentence


def test_a_service_without_what_it_needs_is_refused():
    assert "Process cannot work without Chooser or Work" in refused([Front, Process])


def test_a_cycle_is_named_with_its_path():
    @service(abstract=True)
    class Interface(Service):
        pass

    @service()
    class A(Service):
        next = depends(Interface)

    @service()
    class B(Interface):
        back = depends(A)

    assert "A > B > A" in refused([A, B], [B, A], entry=A)
    assert "A > B > A" in refused([A, B], [B, A])


def test_what_is_no_service_is_refused():
    class Plain:
        pass

    @service()
    class Odd(Service):
        plain = depends(Plain)

    assert "Odd.plain depends on Plain, which is not a service" in refused(entry=Odd)
    assert "Plain is not a service" in refused(entry=Plain)


def test_two_services_of_one_name_are_refused():
    @service(name="Work")
    class Other(Service):
        pass

    @service()
    class Both(Service):
        one = depends(Work)
        two = depends(Other)

    assert "Two services are named Work" in refused(entry=Both)


def test_a_graph_without_links_needs_an_entry_and_one_with_two_needs_a_choice():
    assert "links no services" in refused()
    assert "2 first services, Front and Work" in refused([Front, Process], [Process, KvChooser], [Work, Prefill])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("async def work(self, request): return 1", "is a coroutine, and an endpoint is a stream"),
        ("async def work(self): yield 1", "takes 0 arguments"),
        ("async def work(self, a, b, c): yield 1", "takes 3 arguments"),
    ],
)
def test_a_method_that_cannot_be_an_endpoint_is_refused(body, complaint):
    namespace = {}
    exec(body, namespace)
    with pytest.raises(GraphError, match=complaint):
        service()(type("Odd", (Service,), {"work": endpoint()(namespace["work"])}))


def module_with_links(name, *chain):
    module = types.ModuleType(name)
    vars(module).update({cls.__name__: cls for cls in chain})
    source = chain[0].__name__ + "".join(f".link({cls.__name__})" for cls in chain[1:])
    exec(source, vars(module))
    return module


def test_links_belong_to_the_module_that_wrote_them():
    first = module_with_links("first", Front, Process, Work)
    second = module_with_links("second", Front, Process, KvChooser, Work, Prefill)
    assert set(plan(Graph.of(first)).nodes) == {"Front", "Process", "Work"}
    assert set(plan(Graph.of(second)).nodes) == {"Front", "Process", "KvChooser", "Work", "Prefill"}
    assert Graph.of(sys.modules[__name__]) is None


def test_a_module_imported_while_a_graph_is_built_keeps_its_own_links():
    with Graph.building() as graph:
        Front.link(Process)
        other = module_with_links("other", Process, KvChooser, Work)
        Process.link(Work)
    assert graph.edges == [(Front, Process), (Process, Work)]
    assert Graph.of(other).edges == [(Process, KvChooser), (KvChooser, Work)]


def test_building_twice_gives_two_graphs():
    with Graph.building() as outer:
        Front.link(Process)
        with Graph.building() as inner:
            Process.link(Work)
        Process.link(Work)
    assert inner.edges == [(Process, Work)]
    assert outer.edges == [(Front, Process), (Process, Work)]


def test_drawings():
    with Graph.building("agg") as graph:
        Front.link(Process).link(Work)
    served = plan(graph)
    text = as_text(served, {"Work": 2})
    assert text.splitlines() == [
        "agg",
        "Front",
        "└─ Process",
        "   └─ Work x2  [generate]",
        "not linked: Process.chooser, Work.prefill",
    ]
    assert as_mermaid(served).splitlines()[0] == "graph LR"
    assert "    Process --> Work" in as_mermaid(served).splitlines()
