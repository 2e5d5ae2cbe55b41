"""Names, validity, age and deletion of checkpoints, on folders without tensors."""

import json
import math
import shutil
import time
from contextlib import nullcontext

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.training.checkpoint.compatible import check_compatible
from moepp_megatron.training.checkpoint.files import damage
from moepp_megatron.training.checkpoint.find import (
    check_start,
    find_checkpoint,
    list_checkpoints,
    newest_again,
)
from moepp_megatron.training.checkpoint.retention import Pruner
from tests.refusals import config_error
from tests.unit.training.conftest import config_of


def manifest_of(**fields):
    """A manifest that vouches for what it must, with some fields changed."""
    named = dict.fromkeys((".metadata", "metadata.json", "config.yaml"), "0" * 64)
    files = named | fields.pop("files", {})  # type: ignore[operator]
    return json.dumps({"algorithm": "sha256", "files": files, "sizes": {}} | fields).encode()


def record_of(**fields):
    content = {"format_version": 1, "progress": {}, "layout": {}, "saved_at": 1.0}
    return json.dumps(content | fields).encode()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("__0_0.distcp", b"tensorz" * 100, "__0_0.distcp is damaged"),
        ("__0_0.distcp", b"tensors" * 99, "__0_0.distcp has 693 bytes instead of 700"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
        ("integrity.json", b'{"files": {}}', "integrity.json is damaged"),
        ("integrity.json", b'{"algorithm": "sha256", "files": {}}', "does not vouch for .metadata"),
        ("integrity.json", b"[" * 100_000, "integrity.json is damaged"),
        ("integrity.json", manifest_of(sizes=["a"]), "integrity.json is damaged"),
        ("integrity.json", manifest_of(sizes={".metadata": "5"}), "integrity.json is damaged"),
        ("integrity.json", manifest_of(files={"\ud800": "0"}), "integrity.json is damaged"),
        ("integrity.json", manifest_of(files={"n" * 300: "0"}), "n" * 300),
        ("integrity.json", manifest_of(files={"a\0b": "0"}), "is missing"),
        ("state.json", b"[]", "state.json is no record"),
        ("state.json", b"[" * 100_000, "state.json cannot be read (it is nested more than 64"),
        ("state.json", record_of(saved_at=10**400), "state.json cannot be read"),
        ("state.json", record_of(progress={"step": "5"}), "state.json is no record"),
        ("state.json", record_of(layout={"data_parallel": -1}), "state.json is no record"),
        ("common.pt", b"", "common.pt does not belong"),
    ],
)
def test_damage_names_the_file(write, tmp_path, name, content, why):
    checkpoint = write(tmp_path, 5)
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    reason = str(damage(checkpoint))
    assert why in reason
    assert "\n" not in reason
    # What looks for a checkpoint takes the one before.
    older = write(tmp_path, 4)
    assert find_checkpoint(tmp_path) == older


def test_manifest_may_not_point_outside(write, tmp_path):
    checkpoint = write(tmp_path, 5)
    content = json.loads((checkpoint / "integrity.json").read_text())
    content["files"]["../secret"] = "0" * 64
    (checkpoint / "integrity.json").write_text(json.dumps(content))
    assert "'../secret', which is not a file of this folder" in str(damage(checkpoint))


def test_ranks_share_the_hashing_and_one_of_them_finds_the_damage(write, tmp_path):
    checkpoint = write(tmp_path, 5)
    (checkpoint / "__0_0.distcp").write_bytes(b"tensorz" * 100)
    found = [damage(checkpoint, part, 4) for part in range(4)]
    assert sum(reason is not None for reason in found) == 1


def test_newest_is_the_last_written_not_the_highest_step(write, tmp_path):
    for step, saved_at in ((50, 1.0), (100, 2.0), (60, 3.0)):
        write(tmp_path, step, saved_at)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step_00000060", "step_00000100", "step_00000050"]


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/step_00000010"])
def test_find_by_run_folder_and_checkpoint(write, tmp_path, name):
    write(tmp_path / "checkpoints", 5)
    newest = write(tmp_path / "checkpoints", 10)
    assert find_checkpoint(tmp_path / name) == newest


def test_what_a_live_run_removes_is_looked_for_again(write, tmp_path, caplog):
    first, second, third = (tmp_path / f"step_{step:08d}" for step in (5, 10, 15))
    write(tmp_path, 5)

    def move(old, step):
        shutil.rmtree(old)
        write(tmp_path, step)

    def looks(checkpoint):
        if checkpoint == first:
            move(first, 10)
        return damage(checkpoint)

    assert find_checkpoint(tmp_path, reason_against=looks) == second
    used = []

    @newest_again
    def use(checkpoint, fails=False):
        used.append(checkpoint)
        if checkpoint == second and not fails:
            move(second, 15)
        if checkpoint == second:
            raise ConfigError("not there")
        return checkpoint

    # What was named, or is still there, is not looked for again.
    for name in (second, tmp_path):
        with config_error("not there"):
            use(name, fails=True)
    assert use(tmp_path) == third
    assert used == [second, second, second, third]
    assert caplog.messages == [f"{second} was removed by its run; the newest is taken again"]


def test_find_skips_what_is_damaged_and_says_so(write, tmp_path, caplog):
    older = write(tmp_path, 5)
    newest = write(tmp_path, 10)
    (newest / "__0_0.distcp").unlink()
    assert find_checkpoint(tmp_path) == older
    assert caplog.messages == [f"skipping checkpoint {newest}: __0_0.distcp is missing"]


def test_find_follows_a_configured_folder(write, tmp_path):
    elsewhere = write(tmp_path / "elsewhere", 5)
    run = tmp_path / "run"
    run.mkdir()
    config = config_of(checkpoint={"dir": str(tmp_path / "elsewhere")})
    (run / "config.yaml").write_text(config.to_yaml())
    assert find_checkpoint(run) == elsewhere


def test_nothing_to_find_is_refused(tmp_path):
    with config_error("must be a checkpoint folder or a run"):
        find_checkpoint(tmp_path)
    # An exported model.
    (tmp_path / "config.json").write_text("{}")
    with config_error("hf-to-mcore, any other with moepp convert upcycle"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("step", [5, 20])
def test_a_newer_format_is_refused_and_nothing_is_touched(write, tmp_path, caplog, step):
    """It is no damage: an older one would be continued in its place. Wherever it is in the list."""
    newer, old = write(tmp_path, step), write(tmp_path, 10)
    versions = {"moepp_megatron": "9.8"}
    record = record_of(format_version=2, versions=versions, what="nobody knows")
    (newer / "state.json").write_bytes(record)
    before = sorted(tmp_path.rglob("*"))
    message = (
        rf"^checkpoint \({newer}\) must have format 1, and state.json has format 2; use the "
        r"moepp_megatron that wrote it \(9.8\), or move the checkpoint away$"
    )
    auto, named = (config_of(checkpoint={"load": name}) for name in ("auto", str(newer)))
    for look in (
        lambda: find_checkpoint(tmp_path),
        lambda: find_checkpoint(newer),
        lambda: check_start(auto, tmp_path),
        lambda: check_start(named, tmp_path),
    ):
        with config_error(message) as caught:
            look()
        assert caught.value.exit_code == 2
    assert caplog.messages == []
    # A save cannot refuse: it leaves the checkpoint alone.
    Pruner(tmp_path, keep=1).wrote(old)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("days", [1.0, math.inf, math.nan, 1e300, -1e6])
@pytest.mark.parametrize(
    ("latest", "order"),
    [
        (None, [100_000_000, 40, 30, 20]),
        (100_000_000, [100_000_000, 40, 30, 20]),
        # A run that went back: what is undone comes last.
        (30, [30, 20, 100_000_000, 40]),
        # Deleted since.
        (50, [100_000_000, 40, 30, 20]),
    ],
)
def test_where_a_date_lies_the_order_is_that_of_the_steps(write, tmp_path, days, latest, order):
    lie = time.time() + 86400.0 * days
    for step, saved_at in ((20, lie), (30, 5.0), (40, 4.0), (100_000_000, 3.0)):
        write(tmp_path, step, saved_at)
    if latest is not None:
        (tmp_path / "latest").write_text(f"step_{latest:08d}\n")
    steps = [int(path.name.removeprefix("step_")) for path in list_checkpoints(tmp_path)]
    assert steps == order


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("saved_at", [0.5, 99.0])
def test_what_was_just_written_is_never_pruned(write, tmp_path, keep, saved_at):
    """Whatever its date and its step: a run may have gone back."""
    for step in (5, 10, 15):
        write(tmp_path, step)
    written = write(tmp_path, 4, saved_at)
    Pruner(tmp_path, keep).wrote(written)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"step_00000004", "step_00000015"} if keep == 2 else {written.name})


def test_keep_counts_valid_ones_and_never_deletes_what_is_damaged(write, tmp_path, caplog):
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    (tmp_path / "step_00000015/__0_0.distcp").write_bytes(b"tensorz" * 100)
    (tmp_path / ".step_00000030.incomplete-ab").mkdir()
    Pruner(tmp_path, keep=2).wrote(tmp_path / "step_00000020")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"step_000000{step}" for step in (10, 15, 20)]
    (message,) = caplog.messages
    assert "step_00000015: __0_0.distcp is damaged" in message


LION = {"optimizer": {"kind": "lion"}, "parallel": {"use_distributed_optimizer": False}}


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        ({}, {"model": {"hidden_size": 64}}, r"model.hidden_size \(64\) must be .* \(32\); use 32"),
        # Neither names the experts' width, and no dense layer has that of the model.
        ({}, {"model": {"ffn_hidden_size": 99}}, r"moe.ffn_hidden_size \(99\) must be .* \(48\)"),
        ({}, {"moe": {"num_ffn_experts": 8}}, r"moe.num_ffn_experts \(8\) must be .* \(4\); use 4"),
        ({}, {"moe": {"gating_residual": False}}, r"moe.gating_residual \(false\) must be"),
        ({}, LION, r"optimizer.kind \('lion'\) must be .* \(adam\), whose state"),
        (
            {"layer_freq": [1, 0]},
            {},
            r"moe.layer_freq \(1\) must place .* \(\[1, 0\]\); use \[1, 0\]",
        ),
        ({"ffn_hidden_size": 99}, {}, r"moe.ffn_hidden_size \(48\) must be .* \(99\); use 99"),
        (
            {"shared_expert_ffn_hidden_size": 8},
            {},
            r"moe.shared_expert_ffn_hidden_size \(null\) must be .* \(8\); use 8",
        ),
    ],
)
def test_other_shapes_are_refused_by_name_in_one_line(write, tmp_path, saved, asked, message):
    checkpoint = write(tmp_path / "checkpoints", 5, moe=saved)
    with config_error(rf"^.*{message}.*$"):
        check_compatible(checkpoint, config_of(**asked))
    with config_error(message):
        check_start(config_of(**asked, checkpoint={"load": str(tmp_path)}), tmp_path / "own")


@pytest.mark.parametrize(
    ("batch", "data", "is_refused"),
    [
        (4, {"blend": []}, False),
        (4, {"blend": [{"path": "a", "weight": 1.0}]}, True),
        (16, {"blend": [{"path": "a", "weight": 1.0}]}, False),
        (
            16,
            {"path": "a", "stages": [{"from_step": 9, "blend": [{"path": "b", "weight": 1.0}]}]},
            True,
        ),
    ],
)
def test_what_is_drawn_is_counted_in_batches_of_one_size(write, tmp_path, batch, data, is_refused):
    checkpoint = write(tmp_path, 5, data=data)
    config = config_of(data=data, training={"global_batch_size": batch})
    message = rf"training.global_batch_size \({batch}\) must be that of .* \(8\)"
    with config_error(message) if is_refused else nullcontext():
        check_compatible(checkpoint, config)
    alone = config_of(checkpoint={"load": "there", "load_optimizer": False}).checkpoint
    check_compatible(checkpoint, config.model_copy(update={"checkpoint": alone}))


def test_weights_alone_fit_every_optimizer(write, tmp_path):
    config = config_of(**LION, checkpoint={"load": "there", "load_optimizer": False})
    check_compatible(write(tmp_path, 5), config)


# Two ways to write one model: what is in the checkpoint, and what is asked for.
SAME = {
    "a frequency and its pattern": ({"layer_freq": [1, 1]}, {"layer_freq": 1}),
    "every second layer": ({"layer_freq": [1, 0]}, {"layer_freq": 2}),
    "the experts' default width": ({"ffn_hidden_size": 48}, {"ffn_hidden_size": None}),
    "shared vectors of no experts": (
        {"constants_shared": True, "num_constant_experts": 0},
        {"constants_shared": False, "num_constant_experts": 0},
    ),
    "a residual of one MoE layer": (
        {"gating_residual": True, "layer_freq": 2},
        {"gating_residual": False, "layer_freq": 2},
    ),
}


@pytest.mark.parametrize(("saved", "asked"), SAME.values(), ids=SAME)
def test_settings_are_compared_by_what_they_mean(write, tmp_path, saved, asked):
    for there, here in ((saved, asked), (asked, saved)):
        checkpoint = write(tmp_path / str(id(there)), 5, moe=there)
        check_compatible(checkpoint, config_of(moe=here))


def test_a_width_that_no_layer_has_does_not_count(write, tmp_path):
    # Every layer is an MoE layer, whose experts have a width of their own.
    checkpoint = write(tmp_path, 5, model={"ffn_hidden_size": 99}, moe={"ffn_hidden_size": 48})
    check_compatible(checkpoint, config_of())
    dense = {"layer_freq": 2, "ffn_hidden_size": 48}
    checkpoint = write(tmp_path / "dense", 5, model={"ffn_hidden_size": 99}, moe=dense)
    with config_error(r"^model\.ffn_hidden_size \(48\) must be that of"):
        check_compatible(checkpoint, config_of(moe=dense))
