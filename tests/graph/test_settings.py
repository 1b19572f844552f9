"""Layers of configuration: who wins, where a value comes from, and what is refused."""

import json

import pytest

from core.graph import SettingError, load_settings
from core.graph.config.report import as_json, as_table


def worker(settings):
    return settings.services["Worker"]


def origin(settings, service, key):
    return str(settings.services[service].setting(key).origin)


def refused(configure, *arguments, **more):
    with pytest.raises(SettingError) as caught:
        configure(*arguments, **more)
    return str(caught.value).replace(str(configure.folder), "")


def test_each_layer_beats_the_ones_below(configure):
    def config(source):
        return f"Worker:\n  model: {source}\n"

    common = "Common:\n  model: common\n"
    subscribed = common + "Worker:\n  common-configs: [model]\n"
    assert worker(configure()).config.model == ""
    assert worker(configure(subscribed)).config.model == "common"
    assert worker(configure(common + config("file") + "  common-configs: [model]\n")).config.model == "file"
    assert worker(configure(config("file"), environment={"DYN_DEPLOYMENT_CONFIG": config("env")})).config.model == "env"
    environment = {"DYN_DEPLOYMENT_CONFIG": config("env")}
    assert worker(configure(config("file"), environment=environment, model="short")).config.model == "short"
    settings = configure(config("file"), "Worker.model=line", environment=environment, model="short")
    assert worker(settings).config.model == "line"


def test_every_value_knows_where_it_comes_from(configure):
    settings = configure(
        "Common:\n  model: m\nProcessor:\n  common_configs: [model]\n\nWorker:\n  block_size: 16\n",
        "Worker.eager=true",
        environment={"DYN_DEPLOYMENT_CONFIG": "Worker:\n  share: 0.5\n"},
        engine="sim",
    )
    file = configure.folder / "config.yaml"
    assert origin(settings, "Processor", "model") == f"Common, {file}:2"
    assert origin(settings, "Worker", "model") == f"as Processor.model, Common, {file}:2"
    assert origin(settings, "Worker", "block-size") == f"{file}:7"
    assert origin(settings, "Worker", "eager") == "--Worker.eager"
    assert origin(settings, "Worker", "share") == "DYN_DEPLOYMENT_CONFIG:2"
    assert origin(settings, "Worker", "engine") == "--engine"
    assert origin(settings, "Worker", "ServiceArgs.workers") == "@service of Worker"
    assert origin(settings, "Worker", "names") == "default"


def test_one_value_deep_down_is_changed_without_the_others(configure):
    settings = configure(
        "Worker:\n  ServiceArgs:\n    workers: 1\n    namespace: here\n    envs: {B: '2'}\n"
        "  engine-args: {a: {b: 1, c: 2}}\nProcessor: {ServiceArgs: {namespace: here}}\n",
        "Worker.ServiceArgs.workers=2",
        "Worker.ServiceArgs.envs.CUDA_VISIBLE_DEVICES=0,1",
        "Worker.ServiceArgs.envs.N=5",
        "Worker.engine_args.a.b=7",
    )
    args = worker(settings).args
    assert (args.workers, args.namespace, args.resources.gpus) == (2, "here", 0)
    assert args.envs == {"A": "1", "B": "2", "CUDA_VISIBLE_DEVICES": "0,1", "N": "5"}
    assert worker(settings).config.engine_args == {"a": {"b": 7, "c": 2}}
    assert origin(settings, "Worker", "engine-args.a.b") == "--Worker.engine_args.a.b"
    assert origin(settings, "Worker", "engine-args.a.c").endswith("config.yaml:6")


def test_dashes_and_underscores_are_the_same_everywhere(configure):
    settings = configure("Worker:\n  block_size: 8\n  engine_args: {max_x: 1}\n", "Worker.engine-args.max-x=2")
    assert worker(settings).config.block_size == 8
    assert list(worker(settings).config.engine_args.values()) == [2]
    assert worker(configure("Worker:\n  block_size: 8\n", "Worker.block-size=9")).config.block_size == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2.5, null]", [1, 2.5, None]),
        ('{"a": {"b": true}}', {"a": {"b": True}}),
        ('"7"', "7"),
        ("7", 7),
        ("-7", -7),
        ("1e3", 1000.0),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("{not json", "{not json"),
        ("[NaN]", "[NaN]"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_on_the_command_line(configure, text, value):
    found = worker(configure(None, f"Worker.engine-args.x={text}")).config.engine_args["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1.10", "007", "true", "123", "-1e3"])
def test_a_text_key_takes_the_text_as_it_was_written(configure, text):
    assert worker(configure(None, f"Worker.model={text}")).config.model == text
    assert worker(configure(f"Worker:\n  model: {text}\n")).config.model == text


def test_numbers_of_gpus_may_be_text(configure):
    assert worker(configure("Worker: {ServiceArgs: {resources: {gpu: '2'}}}")).args.resources.gpus == 2


def test_a_key_follows_another_service_only_when_nobody_sets_it(configure):
    settings = configure("Processor:\n  model: p\n")
    assert worker(settings).config.model == "p"
    assert origin(settings, "Worker", "model").startswith("as Processor.model, ")
    assert configure("Worker:\n  model: w\n").services["Processor"].config.model == "w"
    both = configure("Worker:\n  model: w\nProcessor:\n  model: p\n")
    assert (worker(both).config.model, both.services["Processor"].config.model) == ("w", "p")


class TestEngineNames:
    def test_a_section_named_for_an_engine_selects_it(self, configure):
        settings = configure("VllmWorker:\n  model: m\n")
        assert (worker(settings).config.engine, worker(settings).config.model) == ("vllm", "m")
        assert origin(settings, "Worker", "engine").endswith("config.yaml:1")

    def test_the_command_line_engine_wins(self, configure):
        assert worker(configure("VllmWorker: {}", engine="torch")).config.engine == "torch"
        assert worker(configure("VllmWorker: {}", "Worker.engine=torch")).config.engine == "torch"
        assert worker(configure(None, "VllmWorker.model=m", engine="torch")).config.engine == "torch"

    def test_an_override_by_the_engine_name_changes_the_worker(self, configure):
        settings = configure("Worker:\n  engine: torch\n  model: a\n", "VllmWorker.model=b")
        assert (worker(settings).config.engine, worker(settings).config.model) == ("vllm", "b")

    def test_two_sections_for_one_service_are_refused(self, configure):
        sentence = refused(configure, "VllmWorker: {}\nTorchWorker: {}\n")
        assert sentence.startswith(
            "/config.yaml:2: sections VllmWorker (/config.yaml:1) and TorchWorker both configure"
        )

    def test_a_section_that_contradicts_its_name_is_refused(self, configure):
        sentence = refused(configure, "VllmWorker:\n  engine: torch\n")
        assert sentence.startswith("/config.yaml:2: VllmWorker stands for Worker with engine vllm")


class TestCommon:
    def test_only_subscribers_get_it(self, configure):
        settings = configure("Common: {model: m}\nProcessor: {common-configs: [model]}\nWorker: {model: w}\n")
        assert worker(settings).config.model == "w"
        unused = configure("Common: {model: m}\n")
        assert worker(unused).config.model == ""
        assert [(s.key, s.value) for s in unused.unused_common] == [("model", "m")]

    def test_it_can_be_set_on_the_command_line(self, configure):
        settings = configure("Common: {model: m}\nWorker: {common-configs: [model]}\n", "Common.model=n")
        assert worker(settings).config.model == "n"

    def test_what_it_lacks_is_refused(self, configure):
        sentence = refused(configure, "Common:\n  model: m\nWorker:\n  common-configs: [modle]\n")
        assert (
            sentence == "/config.yaml:4: Worker takes 'modle' from Common, which does not have it; did you mean model?"
        )
        assert "no service has the key 'modle' of Common; did you mean model?" in refused(
            configure, "Common: {modle: m}"
        )


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("Wroker: {}", "/config.yaml:1: unknown service 'Wroker'; did you mean Worker"),
        ("worker: {}", "/config.yaml:1: unknown service 'worker'; did you mean Worker"),
        ("\nWorker:\n  blok-size: 1\n", "/config.yaml:3: Worker has no key 'blok-size'; did you mean block-size?"),
        ("Worker: {min-workers: 1}", "/config.yaml:1: Worker has no key 'min-workers'; Router have it."),
        ("Worker: {ServiceArgs: {worker: 1}}", "Worker.ServiceArgs has no key 'worker'; did you mean workers?"),
        ("Worker: 5", "/config.yaml:1: Worker must be a mapping of keys to values, found 5."),
        ("- a\n", "/config.yaml:1: expected services as keys"),
        (
            "Worker:\n  block-size: many\n",
            'Worker.block-size must be a whole number of at least 1 or null, found "many".',
        ),
        ("Worker:\n  block-size: 0\n", "must be a whole number of at least 1 or null, found 0."),
        ("Worker:\n  block-size: 1.5\n", "must be a whole number of at least 1 or null, found 1.5."),
        ("Worker:\n  share: 2\n", "Worker.share must be a number above 0 and of at most 1, found 2."),
        ("Worker:\n  share: nan\n", 'found "nan".'),
        ("Worker:\n  eager: 'yes'\n", 'Worker.eager must be true or false, found "yes".'),
        ("Worker:\n  names: one\n", 'Worker.names must be a list of texts, found "one".'),
        ("Worker:\n  engine-args: 3\n", "Worker.engine-args must be a mapping, found 3."),
        ("Worker:\n  model: null\n", "Worker.model must be text, found null."),
        ("Worker:\n  model: {a: 1}\n", 'Worker.model must be text, found {"a": 1}.'),
        ("Worker: {ServiceArgs: 3}", "Worker.ServiceArgs must be a mapping, found 3."),
        (
            "Worker: {ServiceArgs: {workers: 0}}",
            "Worker.ServiceArgs.workers must be a whole number of at least 1, found 0.",
        ),
        ("Worker: {ServiceArgs: {namespace: 'a b'}}", "Worker.ServiceArgs.namespace must be text"),
        ("Worker:\n  eager: true\n  eager: false\n", "/config.yaml:3: key 'eager' is given twice; it stands at"),
        ("Worker:\n  block-size: 1\n  block_size: 2\n", "it stands at /config.yaml:2 as 'block-size'. Keep one."),
        ("Worker:\n  model: !!python/name:os.system x\n", "tag '!!python/name:os.system' has no meaning here"),
        ("Worker: &a\n  engine-args: *a\n", "an alias that contains itself"),
        (
            "Processor:\n  router: kv\n",
            "Processor.router is 'kv', which needs a Router, and small has only Worker, Processor",
        ),
        ("Router:\n  min-workers: 2\n", "Router.min-workers cannot have an effect: small has no Router"),
        ("Worker: {ServiceArgs: {namespace: b}}", "The services of a graph share one namespace: Worker is in 'b'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(configure, yaml, sentence):
    found = refused(configure, yaml)
    assert sentence in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("yaml", "line", "column"),
    [("Worker:\n  model: [1, 2\n", 3, 0), ("Worker:\n\tmodel: x\n", 2, 0), ("Worker:\n  a: b: c\n", 2, 6)],
)
def test_a_yaml_error_shows_the_line_and_a_caret(configure, yaml, line, column):
    first, *snippet = refused(configure, yaml).splitlines()
    assert first.startswith(f"/config.yaml:{line}: not YAML: ")
    assert snippet[-1] == " " * (2 + column) + "^"


def test_merge_keys_and_anchors_are_read(configure):
    settings = configure("Worker: &w\n  model: m\n  eager: true\nProcessor:\n  <<: {model: p}\n  key: k\n")
    assert settings.services["Processor"].config.model == "p"
    settings = configure("Worker:\n  engine-args: &e {a: 1, b: 2}\n  names: [&n x, *n]\n")
    assert worker(settings).config.names == ("x", "x")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read(configure, content):
    file = configure.folder / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingError, match=r"does not exist|not UTF-8"):
        load_settings(configure.plan, file=file, environment={})


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["Wroker.model=1"], "--Wroker.model: unknown service 'Wroker'; did you mean Worker"),
        (["Worker.modle=1"], "--Worker.modle: Worker has no key 'modle'; did you mean model?"),
        (["Worker.block-size=1", "Worker.block_size=2"], "--Worker.block_size is given twice; keep one."),
        (["Worker.engine-args=1", "Worker.engine-args.a=1"], "contradict each other; keep one."),
        (["Worker..model=1"], "a name is missing between the dots"),
        (["Worker.share=x"], '--Worker.share: Worker.share must be a number above 0 and of at most 1, found "x".'),
    ],
)
def test_overrides_that_cannot_be_used(configure, overrides, sentence):
    assert sentence in refused(configure, None, *overrides)


def test_a_shortcut_that_no_service_takes_is_refused(configure):
    assert "--port: no service of small has the key 'port'" in refused(configure, None, port=1)


class TestReport:
    def test_the_table_has_every_value_with_its_origin(self, configure):
        settings = configure("Worker:\n  model: m\n", "Processor.key=hush")
        lines = [line.split() for line in as_table(configure.plan, settings).splitlines()]
        assert ["model", '"m"', f"{configure.folder}/config.yaml:2"] in lines
        assert ["key", "(hidden)", "--Processor.key"] in lines
        assert ["eager", "false", "default"] in lines
        assert ["ServiceArgs.workers", "3", "@service", "of", "Worker"] in lines
        shown = {line[0] for line in lines}
        assert {v.key for s in settings.services.values() for v in s.values} <= shown

    def test_the_json_says_the_same(self, configure):
        document = json.loads(
            as_json(configure.plan, configure("Worker:\n  engine-args: {a: 1}\n", "Processor.key=hush"))
        )
        assert document["services"]["Worker"]["engine-args.a"] == {
            "value": 1, "origin": f"{configure.folder}/config.yaml:2", "layer": "file",
        }  # fmt: skip
        assert document["services"]["Processor"]["key"]["value"] == "(hidden)"
        assert document["dependencies"] == {"Worker": [], "Processor": ["Worker"]}
