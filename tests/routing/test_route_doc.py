"""docs/route.md says what is so: its policy runs, its table has every setting with its default."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from core.routing import Capacity, PolicyRegistry, Query, Reason, RouterConfig, Selector
from core.routing.registry import BUILT_IN

DOC = (Path(__file__).resolve().parents[2] / "docs" / "route.md").read_text()
CAPACITY = Capacity(block_size=16, num_kv_blocks=100, max_num_batched_tokens=512, max_num_seqs=8)


def test_the_policy_of_the_page_works(monkeypatch, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    (tmp_path / "documented_policy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry = PolicyRegistry([EntryPoint("tenants", "documented_policy:Tenants", "dynamo.policies")])
    selector = Selector(RouterConfig(router="tenants"), 16, registry=registry)
    for worker in ("red-0", "red-1", "blue-0"):
        selector.add_worker(worker, CAPACITY)
    decision = selector.dispatch(Query("r", [1, 2], block_size=16, session="blue-42"))
    assert (decision.target.worker, decision.reason) == ("blue-0", Reason.SESSION)
    assert selector.loads.in_flight == 1


def test_the_page_has_every_setting_and_its_default():
    rows = dict(re.findall(r"^\| (`[a-z`, -]+`) \| ([^|]+) \|", DOC, re.MULTILINE))
    told = {}
    for names, defaults in rows.items():
        values = defaults.split(", ") if names.count("`") > 2 else [defaults]
        told.update(zip(re.findall(r"`([a-z-]+)`", names), values, strict=False))
    defaults = RouterConfig()
    for name in RouterConfig.__struct_fields__:
        value = getattr(defaults, name)
        written = told[name.replace("_", "-")].strip("` ").replace(",", "")
        if value is None:
            assert written == "none"
        elif isinstance(value, bool):
            assert written == str(value).lower()
        elif isinstance(value, int | float):
            assert float(written) == value
        else:
            assert written == str(value)


@pytest.mark.parametrize("name", [*BUILT_IN, *Reason])
def test_the_page_has_every_policy_and_reason(name):
    assert f"`{name}`" in DOC
