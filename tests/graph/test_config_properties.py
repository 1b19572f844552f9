"""Merging, parsing and precedence hold for all inputs, not only for the ones somebody thought of."""

import json

import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.graph.config.origin import Layer, Origin, Tree, canonical, from_plain, merge, plain
from core.graph.config.overrides import override_tree, split_arguments
from core.graph.config.scalar import parse_override, parse_scalar
from core.graph.config.yaml_source import load_text

HERE = Origin(Layer.FILE, "here")
keys = st.sampled_from(["a", "b", "c", "a-b", "b-c"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
inner = st.dictionaries(keys, scalars, min_size=1, max_size=3)
outer = st.dictionaries(keys, scalars | inner, min_size=1, max_size=3)
mappings = st.dictionaries(keys, scalars | outer, max_size=3)


def tree(data):
    return from_plain(data, HERE)


def leaves(data, path=()):
    if not isinstance(data, dict):
        yield path, data
        return
    for key, value in data.items():
        yield from leaves(value, (*path, canonical(key)))


@given(mappings)
def test_a_tree_holds_what_went_in(data):
    assert plain(tree(data)) == data
    assert plain(merge(tree(data), tree(data))) == data
    assert plain(merge(tree(data), Tree(HERE, {}))) == data
    assert plain(merge(None, tree(data))) == data


@given(mappings, mappings)
def test_the_higher_layer_keeps_all_its_values_and_the_lower_fills_the_gaps(high, low):
    merged = plain(merge(tree(high), tree(low)))
    above, below, found = dict(leaves(high)), dict(leaves(low)), dict(leaves(merged))
    assert above.items() <= found.items()
    assert found.items() <= (below | above).items()
    for path in below:
        covered = any(path[: len(p)] == p or p[: len(path)] == path for p in above)
        assert path in found or covered


@given(mappings, mappings, mappings)
def test_merging_layers_does_not_depend_on_how_they_are_grouped_unless_kinds_differ(one, two, three):
    def kinds(data):
        return {p for p, _ in leaves(data)}

    paths = [*kinds(one), *kinds(two), *kinds(three)]
    if any(a != b and b[: len(a)] == a for a in paths for b in paths):
        return  # a value in one layer is a mapping in another: the middle one decides which of the two it hides
    left = merge(merge(tree(one), tree(two)), tree(three))
    right = merge(tree(one), merge(tree(two), tree(three)))
    assert plain(left) == plain(right)


@given(st.recursive(scalars, lambda i: st.lists(i, max_size=3) | st.dictionaries(st.text(), i, max_size=3)))
def test_json_on_the_command_line_means_what_it_says(value):
    if not isinstance(value, float):
        assert parse_override(json.dumps(value)) == value


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_back_exactly(number):
    found = parse_scalar(repr(number))
    assert found == number
    assert type(found) is type(number)


@given(st.text())
def test_a_scalar_that_is_text_is_the_same_text(text):
    found = parse_scalar(text)
    assert not isinstance(found, str) or found == text


@given(mappings)
def test_a_file_written_as_yaml_is_read_back(data):
    document = {"Worker": {"engine-args": data}}
    text = yaml.safe_dump(document, default_style='"', allow_unicode=True)
    found = load_text(text, "x", Layer.FILE).plain()
    assert dict(leaves(found)).keys() == dict(leaves(document)).keys()


@given(st.dictionaries(st.sampled_from(["A.x", "A.y.z", "B.x_y", "C-d.e"]), st.text(), max_size=4), st.data())
def test_overrides_are_told_from_other_arguments_in_every_spelling(values, data):
    arguments, expected_others = [], []
    for path, text in values.items():
        for other in data.draw(st.lists(st.sampled_from(["graphs.agg", "--dry-run", "-f", "x.yaml"]), max_size=2)):
            arguments.append(other)
            expected_others.append(other)
        spellings = [
            [f"--{path}={text}"],
            [f"--{path}", "=", text] if not text.startswith("-") else [f"--{path}={text}"],
        ]
        arguments += data.draw(st.sampled_from(spellings))
    others, overrides = split_arguments(arguments)
    assert others == expected_others
    assert dict(overrides) == values
    assert all(isinstance(n, Tree) for _, n in override_tree(overrides).entries.values())
