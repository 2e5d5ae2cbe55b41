"""Loading: bases, overrides, YAML's corners, the round trip, speed of import."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from moepp_megatron.config import (
    Config,
    check_config,
    check_world_size,
    load_config,
    parse_config,
    with_overrides,
)
from moepp_megatron.config.schema import Section
from moepp_megatron.config.schema.section import Unit, meaning_of
from moepp_megatron.config.sections import section_models, subsection
from moepp_megatron.experts import Setting
from tests import ROOT
from tests.refusals import config_error, refusal

CONFIGS = ROOT / "configs"


def test_defaults_are_valid_and_silent(minimal):
    config = load_config(minimal)
    assert config.model.query_groups == 8
    assert config.model.head_dim == 8
    assert config.moe.num_zero_computation_experts == 4
    assert config.moe.num_experts == 12
    assert config.moe.ffn_share == pytest.approx(0.6)  # 0.75 * 8 / (0.75 * 8 + 4)
    assert not config.moe.is_vanilla
    assert config.parallel.expert_tensor_size == 1
    assert config.checkpoint.folder(config.run.dir) == "runs/test/checkpoints"
    assert check_config(config) == []


def test_base_is_merged_key_by_key_and_relative_to_the_file_naming_it(
    minimal, tmp_path, monkeypatch
):
    (tmp_path / "sub").mkdir()
    (tmp_path / "middle.yaml").write_text(
        "base: minimal.yaml\nmoe: {tau: 0.5, router_topk: 3, layer_freq: [1, 0, 1, 0]}\n"
    )
    top = tmp_path / "sub/top.yaml"
    top.write_text("base: ../middle.yaml\nmoe: {tau: 0.25, layer_freq: [1, 1, 0, 0]}\ndata:\n")
    monkeypatch.chdir("/")
    config = load_config(top)
    assert config.model.num_layers == 4
    assert config.moe.router_topk == 3
    assert config.moe.tau == 0.25
    assert config.moe.layer_freq == [1, 1, 0, 0]  # a list replaces a list
    assert config.moe.moe_layer_pattern(4) == [True, True, False, False]


def test_section_inside_a_section_is_merged_key_by_key(minimal, tmp_path):
    (tmp_path / "middle.yaml").write_text(
        "base: minimal.yaml\nmoe: {budget: {target_ffn_per_token: 1.0, decay: 0.5}}\n"
    )
    top = tmp_path / "top.yaml"
    top.write_text("base: middle.yaml\nmoe:\n  budget: {controller: tau}\n")
    config = load_config(top, ["moe.budget.decay=0.25"])
    budget = config.moe.budget
    assert (budget.target_ffn_per_token, budget.controller, budget.decay) == (1.0, "tau", 0.25)
    assert config.moe.ffn_share == 0.5
    assert config.moe.balanced_tau == pytest.approx(0.5)  # 0.5 * 8 / (0.5 * 8 + 4) is a half
    again = with_overrides(config, ["moe.budget.controller=none"])
    assert (again.moe.budget.controller, again.moe.budget.decay) == ("none", 0.25)


def test_a_target_is_held_by_a_selection_bias_unless_told_otherwise(minimal):
    plain = load_config(minimal, [])
    assert (plain.moe.budget.held_by, plain.moe.selection_bias) == ("none", False)
    held = with_overrides(plain, ["moe.budget.target_ffn_per_token=1.0"])
    assert (held.moe.budget.held_by, held.moe.selection_bias) == ("bias", True)
    # The bias goes with the controller, since nobody asked for it by itself.
    for controller in ("none", "tau"):
        other = with_overrides(held, [f"moe.budget.controller={controller}"])
        assert (other.moe.budget.held_by, other.moe.selection_bias) == (controller, False)
    assert with_overrides(plain, ["moe.budget.controller=bias"]).moe.selection_bias
    # As a run's own config.yaml names it.
    assert load_config(minimal, ["moe.selection_bias=false", "moe.budget.controller=bias"])


def test_base_cycle_is_refused_with_its_chain(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: c.yaml\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\n")
    b, c = tmp_path / "b.yaml", tmp_path / "c.yaml"
    assert f"{b} -> {c} -> {b}" in refusal(load_config, tmp_path / "a.yaml")


def test_unknown_key_names_its_file(minimal, tmp_path):
    top = tmp_path / "top.yaml"
    top.write_text("base: middle.yaml\n")
    middle = tmp_path / "middle.yaml"
    middle.write_text("base: minimal.yaml\nmoe: {top_k: 1}\n")
    assert (
        refusal(load_config, top) == "unknown key moe.top_k; did you mean moe.router_topk or "
        f"distillation.top_k? (in {middle})"
    )


def test_a_resolved_configuration_of_an_older_version_loads(minimal, tmp_path):
    """It names every setting, so those that are gone too."""
    resolved = load_config(minimal).model_dump(mode="json")
    current = parse_config(resolved)
    removed = [(s, *row) for s, model in section_models().items() for row in model.removed.items()]
    assert len(removed) > 5
    for section, key, (value, remedy) in removed:
        name = f"{section}.{key}"
        old = {**resolved, section: {**resolved[section], key: value}}
        assert parse_config(old) == current
        path = tmp_path / "old.yaml"
        path.write_text(yaml.safe_dump(old))
        assert load_config(path) == current
        old[section][key] = "another"
        told = refusal(parse_config, old)
        assert told.startswith(f"{name} ('another') has been removed; {remedy}")
        with config_error(f"{name} has been removed"):
            load_config(minimal, [f"{name}={value}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("5.0e-4", 5e-4),
        ("+2.5e+1", 25.0),
        (".5e0", 0.5),
        ("1", 1.0),
        ("0.01", 0.01),
    ],
)
def test_numbers_as_people_write_them(minimal, text, value):
    assert load_config(minimal, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_overrides_are_yaml_and_the_last_one_wins(minimal):
    config = load_config(
        minimal,
        [
            "moe.tau=0.1",
            "moe.tau=0.5",
            "moe.capacity_factor=null",
            "moe.gating_residual=false",
            "moe.layer_freq=[1, 0, 0, 1]",
            "data.path=some/where=here",
            "checkpoint.load=auto",
        ],
    )
    assert config.moe.tau == 0.5
    assert config.moe.capacity_factor is None
    assert config.moe.gating_residual is False
    assert config.moe.layer_freq == [1, 0, 0, 1]
    assert config.data.path == Path("some/where=here")
    assert config.checkpoint.load == "auto"


def test_home_is_expanded(minimal, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    names = ("run.dir", "checkpoint.load", "checkpoint.dir", "data.cache", "routes.record")
    config = load_config(minimal, [f"{name}=~/it" for name in names])
    sections = config.model_dump(mode="json")
    for section, key in (name.split(".") for name in names):
        assert sections[section][key] == "/home/somebody/it"


def test_round_trip(minimal, tmp_path):
    config = load_config(
        minimal,
        ["moe.layer_freq=[1, 0, 1, 1]", "optimizer.adam_eps=1e-12", "data.path=d", "run.name='1'"],
    )
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml(comment="moepp_megatron 0.1.0\ncommit abc"))
    assert written.read_text().startswith("# moepp_megatron 0.1.0\n# commit abc\nrun:\n")
    again = load_config(written)
    assert again == config
    assert again.to_yaml() == config.to_yaml()


def test_resolved_configuration_does_not_count_defaults_as_set(minimal, tmp_path):
    vanilla = [f"moe.num_{kind}_experts=0" for kind in ("zero", "copy", "constant")]
    config = load_config(minimal, [*vanilla, "moe.gating_residual=false"])
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written).moe.is_vanilla
    assert check_config(load_config(written)) == []


def test_with_overrides_checks_and_leaves_the_original(minimal):
    config = load_config(minimal)
    assert with_overrides(config, ["moe.tau=0.5"]).moe.tau == 0.5
    assert config.moe.tau == 0.75
    with config_error(r"moe\.router_topk \(99\)"):
        with_overrides(config, ["moe.router_topk=99"])


# Ranks that each configuration of models is meant for.
FITS = {
    "quickstart.yaml": (2,),
    "models/moepp_0.6b_8_4.yaml": (1, 8, 64),
    "models/moepp_1b_16_4.yaml": (8, 64),
    "models/moepp_2b_32_8.yaml": (8, 64),
    "models/moepp_7b_16_4.yaml": (8, 32, 64),
    "models/moepp_7b_16_4_fp8.yaml": (8, 32, 64),
    "models/moepp_7b_16_4_equal_work.yaml": (8, 32, 64),
    "models/fine_grained_60_4.yaml": (8, 64),
    "models/qwen3_30b_a3b_32.yaml": (8, 64),
    "models/deepseek_v3_256_64.yaml": (8, 1024),
    "upcycle/mixtral_8x7b_8_4.yaml": (32, 64),
    "upcycle/qwen3_30b_a3b_128_32.yaml": (32, 64),
}


@pytest.mark.parametrize(("name", "world_sizes"), FITS.items())
def test_shipped_configuration_fits(name, world_sizes):
    config = load_config(CONFIGS / name)
    assert check_config(config) == []
    for world_size in world_sizes:
        overlaps_nothing = world_size == 1
        assert bool(check_world_size(config, world_size)) == overlaps_nothing


def test_every_shipped_configuration_is_tested():
    # test_hardware.py reads descriptions of cards; planned layouts have dry runs.
    paths = (p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("hardware", "h100"))
    bases = {"models/_paper.yaml", "upcycle/_recipe.yaml"}
    assert {str(path.relative_to(CONFIGS)) for path in paths} == {*FITS, *bases}


def described_settings(path, model):
    """Checks each setting of a section and of the sections inside it; returns how many."""
    count = 0
    for name, setting in model.model_fields.items():
        assert meaning_of(setting), f"{path}.{name}"
        if (inner := subsection(model, name)) is not None:
            count += described_settings(f"{path}.{name}", inner)
            continue
        is_number = {int, float} & {setting.annotation, *get_args(setting.annotation)}
        assert not is_number or any(isinstance(m, Unit | Setting) for m in setting.metadata)
        count += 1
    return count


def test_every_setting_is_described_with_its_unit():
    sections = list(Config.model_fields.items())
    for name, field in sections:
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section), name
    assert described_settings("config", Config) > 100


def test_a_section_that_may_be_left_out(minimal, tmp_path):
    assert load_config(minimal).model.latent_attention is None
    name = "model.latent_attention"
    config = load_config(minimal, [f"{name}.kv_lora_rank=32", f"{name}.v_head_dim=16"])
    latent = config.model.latent_attention
    assert (latent.kv_lora_rank, latent.v_head_dim, latent.qk_dim) == (32, 16, 192)
    # Key by key over a base, and null takes it back.
    base = tmp_path / "latent.yaml"
    base.write_text(config.to_yaml())
    assert load_config(base) == config
    narrower = load_config(base, [f"{name}.v_head_dim=8"])
    assert narrower.model.latent_attention == latent.model_copy(update={"v_head_dim": 8})
    assert with_overrides(config, [f"{name}=null"]) == load_config(minimal)
    with config_error("did you mean model.latent_attention.kv_lora_rank"):
        load_config(minimal, [f"{name}.kv_lora=32"])
    with config_error(r"model\.latent_attention must be a mapping of keys"):
        load_config(minimal, [f"{name}=[1]"])


@pytest.mark.parametrize(
    ("text", "enabled"),
    [("safe", True), ("observe", None), ("off", False), ("{enabled: true}", True)],
)
def test_one_word_stands_for_a_section(tmp_path, minimal, text, enabled):
    """In a file over its base, and as an override; what the word does not set stays."""
    base = tmp_path / "base.yaml"
    base.write_text(minimal.read_text() + "routing_guard: {enabled: false, warmup: 3}\n")
    over = tmp_path / "over.yaml"
    over.write_text(f"base: base.yaml\nrouting_guard: {text}\n")
    found = [load_config(over), load_config(base, [f"routing_guard={text}"])]
    for config in found:
        guard = config.routing_guard
        assert (guard.enabled, guard.warmup) == (enabled, 3)
    # As it is recorded.
    again = tmp_path / "again.yaml"
    again.write_text(found[0].to_yaml())
    assert load_config(again) == found[0]


def test_the_guard_only_tells_unless_it_is_told_to_act(minimal):
    assert load_config(minimal).routing_guard.enabled is None
    assert not load_config(minimal).routing_guard.acts
    assert load_config(minimal, ["routing_guard=safe"]).routing_guard.acts
