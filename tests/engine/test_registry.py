"""Finding engines: through entry points, one broken plug-in disturbing no other, every error saying what there is."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from core.engine import EngineRegistry, InvalidAdapter, Source
from core.engine.registry import GROUP
from core.messages import ConfigError
from tests.engine.adapters import SOURCE, Plain, described

HERE = "tests.engine.test_registry"


class Other(described(name="other")):
    """A second engine."""


class Impostor(described(name="plain")):
    """An engine with a name that is taken."""


not_a_class = Plain()


def entry(name: str, target: str) -> EntryPoint:
    """An entry point of this group, as an installed package has it."""
    return EntryPoint(name, target, GROUP)


PLAIN = entry("plain", "tests.engine.adapters:Plain")


def test_engines_are_found_by_name():
    """Entry points become engines, each instance a new one."""
    registry = EngineRegistry([PLAIN, entry("other", f"{HERE}:Other")])
    assert sorted(registry.adapters) == ["other", "plain"]
    assert registry.get("plain").create() is not registry.get("plain").create()
    assert not registry.broken


def test_the_same_entry_point_twice():
    """A package that is found twice, on two paths, is one engine."""
    registry = EngineRegistry([PLAIN, entry("plain", "tests.engine.adapters:Plain")])
    assert (list(registry.adapters), registry.broken) == (["plain"], [])


def test_unknown_engine_with_nearest_names():
    """An unknown name is answered with those like it."""
    with pytest.raises(ConfigError, match=r"Unknown engine 'plian'; did you mean plain\?.*'dynamo engines'"):
        EngineRegistry([PLAIN]).get("plian")


def test_unknown_engine_unlike_any():
    """A name like no other is answered with all there are."""
    with pytest.raises(ConfigError, match="Unknown engine 'zzz'; known are plain"):
        EngineRegistry([PLAIN]).get("zzz")
    with pytest.raises(ConfigError, match="known are none"):
        EngineRegistry(()).get("zzz")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such_module:Engine", "could not be loaded: ModuleNotFoundError"),
        ("tests.engine.adapters:NoSuchClass", "could not be loaded: AttributeError"),
        ("tests.engine.exiting:Engine", "could not be loaded: SystemExit"),
        (f"{HERE}:not_a_class", "is a Plain object, not a class: write 'module:Class'"),
        ("tests.engine.adapters:CONFIG", "is a EngineConfig object, not a class"),
        ("tests.engine.adapters:registered", "could not be created: TypeError"),
        ("builtins:dict", "has no hook 'describe_engine'"),
    ],
)
def test_broken_plugin(target: str, says: str):
    """A plug-in that cannot be used is listed with the reason, and asking for it gives the reason."""
    registry = EngineRegistry([entry("broken", target), PLAIN])
    assert list(registry.adapters) == ["plain"]
    assert [broken.source for broken in registry.broken] == [Source("broken", "?")]
    with pytest.raises(ConfigError) as error:
        registry.get("broken")
    assert says in str(error.value)


def test_duplicate_name():
    """Two packages with one name: the second is refused, naming both and the fix."""
    registry = EngineRegistry([PLAIN])
    with pytest.raises(InvalidAdapter) as error:
        registry.add(Impostor, Source("plain", "impostor-package"))
    assert "of package 'impostor-package' is named 'plain'" in str(error.value)
    assert "uninstall one of the two packages or rename" in str(error.value)
    assert registry.get("plain").create().__class__ is Plain


def test_duplicate_entry_points():
    """Duplicates among installed packages leave the first and list the second."""
    registry = EngineRegistry([entry("plain", f"{HERE}:Impostor"), PLAIN])
    assert len(registry.adapters) == len(registry.broken) == 1


def test_name_unlike_the_entry_point():
    """The entry point and the description agree on the name, which users write."""
    registry = EngineRegistry([entry("mine", "tests.engine.adapters:Plain")])
    assert "describes an engine named 'plain'" in registry.broken[0].error


def test_refused_adapter_changes_nothing():
    """A refusal leaves the registry as it was."""
    registry = EngineRegistry([PLAIN])
    with pytest.raises(InvalidAdapter):
        registry.add(dict, SOURCE)
    assert list(registry.adapters) == ["plain"]


def test_availability():
    """An engine whose package is absent says so with the command that installs it; one that needs none is available."""
    absent = EngineRegistry(()).add(described(package="no-such-package", install="pip install no-such-package"), SOURCE)
    assert absent.version is None
    assert absent.unavailable == (
        "package 'no-such-package' is not installed; install it with: pip install no-such-package"
    )
    plain = EngineRegistry(()).add(Plain, SOURCE)
    assert (plain.unavailable, plain.caution, plain.version) == (None, None, None)


@pytest.mark.parametrize(("tested", "fits"), [(">=1", True), ("<1", False), ("", True)])
def test_tested_range(tested: str, fits: bool):
    """A version outside of the tested range is said, with the range, the version found and what to do."""
    version = importlib.metadata.version("pluggy")
    kind = described(package="pluggy", install="pip install pluggy", tested=tested)
    adapter = EngineRegistry(()).add(kind, SOURCE)
    assert (adapter.tested, adapter.version) == (fits, version)
    assert (adapter.caution is None) == fits
    if adapter.caution:
        assert f"tested with pluggy <1 and {version} is installed" in adapter.caution
        assert "pip install 'pluggy<1'" in adapter.caution


def test_version_that_is_no_version(monkeypatch: pytest.MonkeyPatch):
    """A package whose version cannot be compared counts as untested instead of breaking the listing."""
    kind = described(package="pluggy", install="pip install pluggy", tested=">=1")
    adapter = EngineRegistry(()).add(kind, SOURCE)
    monkeypatch.setattr("core.engine.registry._installed_version", lambda package: "nightly-build")
    assert not adapter.tested


def test_listing_imports_no_engine():
    """Listing the built-in engines imports none of them, nor torch."""
    code = (
        "import sys\n"
        "from importlib.metadata import EntryPoint\n"
        "from core.engine import EngineRegistry\n"
        "points = [EntryPoint(n, v, 'dynamo.engines') for n, v in (a.split('=') for a in sys.argv[1:])]\n"
        "registry = EngineRegistry(points)\n"
        "assert len(registry.adapters) == len(points), registry.broken\n"
        "for adapter in registry.adapters.values():\n"
        "    adapter.version, adapter.tested, adapter.unavailable\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'numpy', 'vllm', 'sglang', 'tensorrt_llm', 'llguidance'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[2]
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    points = [f"{name}={value}" for name, value in project["entry-points"][GROUP].items()]
    command = [sys.executable, "-c", code, *points]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
