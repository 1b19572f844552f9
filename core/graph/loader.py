"""Finds a graph by the name a user types: `graphs.agg`, `graphs.agg:Frontend`, `my_folder.my_graph:Entry`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from core.graph.errors import GraphError
from core.graph.links import Graph
from core.graph.nearest import nearest
from core.graph.plan import Plan, plan
from core.graph.service import is_service, spec_of


def load_plan(target: str, working_dir: Path | None = None) -> Plan:
    """Import a graph module and resolve it.

    The working directory comes first, then what is installed. Raises `GraphError` for a module or service that does
    not exist, naming the nearest that do, and for a graph that cannot be served.
    """
    module_name, _, entry_name = target.partition(":")
    module = _import(module_name, (working_dir or Path.cwd()).resolve())
    services = {spec_of(v).name: v for v in vars(module).values() if is_service(v)}
    services.update({name: v for name, v in vars(module).items() if is_service(v)})
    graph = Graph.of(module)
    if not services and graph is None:
        raise GraphError(f"{module_name} has no services: a graph module imports services and links them.")
    if entry_name:
        if entry_name not in services:
            hint = nearest(entry_name, services)
            raise GraphError(f"{module_name} has no service '{entry_name}'; {hint}")
        return plan(graph or Graph(module_name), services[entry_name])
    if graph is None and len(set(services.values())) == 1:
        return plan(Graph(module_name), next(iter(services.values())))
    return plan(graph or Graph(module_name))


def known_graphs(working_dir: Path | None = None) -> list[str]:
    """Names of the graph modules in the working directory's `graphs` folder and in the installed `graphs` package."""
    folders = [(working_dir or Path.cwd()) / "graphs"]
    folders += [Path(entry or ".") / "graphs" for entry in sys.path]
    names = {info.name for folder in folders if folder.is_dir() for info in pkgutil.iter_modules([str(folder)])}
    return sorted(f"graphs.{name}" for name in names)


def _import(name: str, working_dir: Path) -> ModuleType:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise GraphError(
            f"'{name}' is not a graph module; write it as Python imports it, "
            "as in 'graphs.agg' or 'graphs.agg:Frontend'."
        )
    if str(working_dir) not in sys.path:
        sys.path.insert(0, str(working_dir))
    try:
        _join_portions(name.partition(".")[0], working_dir)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise GraphError(f"Graph {name} imports '{missing}', which is not installed.") from error
    except SyntaxError as error:
        raise GraphError(f"Graph {name} is not valid Python: {error}.") from error
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(f"Graph {name} could not be imported: {type(error).__name__}: {error}.") from error
    raise GraphError(f"Unknown graph '{name}'; {nearest(name, known_graphs(working_dir))}")


def _join_portions(package_name: str, working_dir: Path) -> None:
    """Let `graphs.x` be found in the working directory's folder and, failing that, in an installed package's."""
    package = importlib.import_module(package_name)
    if not hasattr(package, "__path__"):
        return
    portions = [str(folder / package_name) for folder in (working_dir, *(Path(e or ".") for e in sys.path))]
    package.__path__ = list(dict.fromkeys(p for p in [*portions[:1], *package.__path__, *portions] if Path(p).is_dir()))
