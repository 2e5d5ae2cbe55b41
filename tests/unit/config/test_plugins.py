"""Settings that name entry points of installed packages."""

import sys

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.config.choices import pick
from moepp_megatron.config.plugins import check_plugins, load_plugin
from tests.example_plugins import install, write_entry_points
from tests.parallel.training_runs import settings
from tests.refusals import config_error, refusal

SETTINGS = {
    "optimizer": {"kind": "adam_l2", "decay_style": "inverse_root"},
    "data": {"dataset": "one_batch"},
    "observe": {"sinks": ["csv"]},
    "run": {"callbacks": ["patience"], "parts": ["mean_loss"]},
}


def config(changes):
    return parse_config(settings(**changes))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path))
    yield tmp_path
    sys.modules.pop("moepp_example_plugins", None)


def test_a_bare_name_is_written_with_its_prefix(installed):
    found = config(SETTINGS)
    named = {
        found.optimizer.kind,
        found.optimizer.decay_style,
        found.data.dataset,
        *found.observe.sinks,
        *found.run.callbacks,
        *found.run.parts,
    }
    names = ("adam_l2", "inverse_root", "one_batch", "csv", "patience", "mean_loss")
    assert named == {f"plugin:{name}" for name in names}
    check_plugins(found)
    assert parse_config(found.model_dump(mode="json")) == found
    # Looking for names has imported nothing.
    assert "moepp_example_plugins" not in sys.modules


def test_a_configuration_can_be_read_where_the_package_is_not(tmp_path):
    assert refusal(check_plugins, config({"optimizer": {"kind": "plugin:adam_l2"}})) == (
        "optimizer.kind ('plugin:adam_l2') must be an entry point of the group "
        "moepp_megatron.optimizers (none is installed); install the package that has it, or "
        "correct the name"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": {"decay_style": "inverse_rot"}},
            "optimizer.decay_style ('inverse_rot') must be one of cosine, linear, constant, "
            "inverse-square-root, WSD, or an entry point of the group moepp_megatron.schedules "
            "(inverse_root); use inverse_root",
        ),
        (
            {"optimizer": {"decay_style": "cosin"}},
            "optimizer.decay_style ('cosin') must be one of cosine, linear, constant, "
            "inverse-square-root, WSD, or an entry point of the group moepp_megatron.schedules "
            "(inverse_root); use cosine",
        ),
        (
            {"run": {"callbacks": ["patience", "patient"]}},
            "run.callbacks (['patience', 'patient']) must be an entry point of the group "
            "moepp_megatron.callbacks (patience); use patience",
        ),
        (
            {"run": {"callbacks": "patience"}},
            "run.callbacks ('patience') must be a list; write it as [a, b]",
        ),
        (
            {"observe": {"sinks": [3]}},
            "observe.sinks ([3]) must be a list whose every entry is text; put it in quotes",
        ),
    ],
)
def test_unknown_names(installed, changes, message):
    assert refusal(config, changes) == message


def test_what_a_name_stands_for(installed):
    assert pick({"gpt": 1}, "data.dataset", "gpt", "datasets") == 1
    found = pick({"gpt": 1}, "data.dataset", "plugin:one_batch", "datasets")
    assert found.__name__ == "one_batch"


def test_a_name_of_two_packages_is_refused(installed):
    groups = {"moepp_megatron.sinks": {"csv": "other:Sink"}}
    write_entry_points(installed, groups, "other")
    with config_error("must be of one package, and is of several") as refused:
        check_plugins(config({"observe": {"sinks": ["csv"]}}))
    assert "moepp_example_plugins:CsvSink" in str(refused.value)


def test_a_package_that_fails_to_import(tmp_path, monkeypatch):
    write_entry_points(tmp_path, {"moepp_megatron.sinks": {"broken": "moepp_broken:Sink"}})
    (tmp_path / "moepp_broken.py").write_text("raise OSError('no\\nlicence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(load_plugin, "sinks", "observe.sinks", "plugin:broken") == (
        "observe.sinks (plugin:broken) must be importable, and moepp_broken:Sink raises "
        "OSError: no licence; repair or reinstall the package"
    )


def test_the_same_package_twice_on_the_path_is_one(installed, tmp_path_factory, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path_factory.mktemp("again")))
    check_plugins(config({"observe": {"sinks": ["csv"]}}))
