"""Weights & Biases, by a stand-in for its package."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from moepp_megatron.config.schema import WandbSection
from moepp_megatron.observe.sinks import Sinks, SinkSettings
from moepp_megatron.observe.wandb_sink import WandbSink
from moepp_megatron.runtime.optional import have_wandb
from tests.unit.observe.conftest import EXPERTS, make_record, write_steps

OFFLINE = WandbSection(project="moe", entity="team", mode="offline")


class StandIn(ModuleType):
    """Keeps what it is asked."""

    def __init__(self, failure=None):
        super().__init__("wandb")
        self.failure = failure
        self.inits = []
        self.logged = []
        self.finished = 0
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        if self.failure is not None:
            raise self.failure
        self.inits.append(arguments)
        return SimpleNamespace(log=self.logged.append, finish=self.finish, define_metric=self.axis)

    def axis(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def finish(self):
        self.finished += 1


def open_sink(folder, resumes=False):
    return WandbSink(OFFLINE, folder, "quick", {"moe": {"tau": 0.75}}, EXPERTS, resumes)


def test_records_and_settings_arrive(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sink = open_sink(tmp_path)
    health = {"gate_entropy": [1.0, 1.5]}
    sink.write(make_record(3, layer_ffn_fraction=[0.5, 0.75], valid_loss=5.5, router_health=health))
    sink.close()
    (init,) = wandb.inits
    assert (init["project"], init["entity"], init["mode"]) == ("moe", "team", "offline")
    assert (init["name"], init["dir"], init["config"]) == (
        "quick",
        str(tmp_path),
        {"moe": {"tau": 0.75}},
    )
    assert init["settings"]["console"] == "off"
    assert init["settings"]["disable_code"]
    (values,) = wandb.logged
    assert (values["step"], values["loss"], values["valid_loss"]) == (3, 5.25, 5.5)
    assert values["expert_share/constant_0"] == 0.25
    assert values["layer_ffn_fraction/moe_layer_2"] == 0.75
    assert values["router_health/gate_entropy/moe_layer_2"] == 1.5
    assert all(isinstance(value, int | float) for value in values.values())
    assert wandb.finished == 1


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resumes in (False, True, False, True):
        open_sink(tmp_path, resumes).close()
    first, resumed, anew, again = [init["id"] for init in wandb.inits]
    assert first == resumed != anew == again


def test_open_sinks_trains_on_where_it_cannot_start(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    monkeypatch.setitem(sys.modules, "wandb", StandIn(RuntimeError("key 0123secret\nrefused")))
    run = SinkSettings(tmp_path, EXPERTS, 0.5, total_steps=1, wandb=OFFLINE, name="quick")
    sinks = Sinks.open(run)
    write_steps(sinks, 1)
    sinks.close()
    assert "no W&B output: W&B cannot start: key *** refused" in caplog.text
    assert "0123secret" not in caplog.text


def test_a_missing_package_is_named_on_use_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="-m pip install wandb$"):
        open_sink(tmp_path)


def test_its_own_folder_is_not_the_package(tmp_path, monkeypatch):
    if have_wandb():
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not have_wandb()
