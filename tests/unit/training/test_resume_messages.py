"""The messages of a resumed run: where it starts, and what differs from before."""

from moepp_megatron.config import Layout
from moepp_megatron.training.checkpoint import files
from moepp_megatron.training.checkpoint.files import Progress, SavedRecord
from moepp_megatron.training.checkpoint.read import start_lines
from tests.parallel.training_runs import merged
from tests.unit.training.conftest import config_of

TRAINING = {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2}
OPTIMIZER = {"lr": 1.0e-3, "min_lr": 1.0e-4, "decay_style": "linear", "warmup_iters": 2}


def resumed(folder, ranks=1, saved=None, **changes):
    """Lines of a run that is resumed with some changes after 6 of 10 steps on one rank."""
    sections = {"training": TRAINING, "optimizer": OPTIMIZER}
    before = config_of(**sections, **saved or {})
    (folder / "config.yaml").write_text(before.to_yaml())
    record = SavedRecord.now(Progress(6, 48, 768), Layout.from_config(before, 1))
    now = config_of(**merged(sections, changes))
    return start_lines(folder, record, now, Layout.from_config(now, ranks))


def test_the_same_run_says_only_where_it_continues(tmp_path):
    assert resumed(tmp_path, run={"dir": "elsewhere"}) == [f"resumed from step 6 of {tmp_path}"]


def test_other_versions_than_those_of_the_checkpoint_are_one_warning(tmp_path, monkeypatch):
    here = {**files.package_versions(), "triton": "9"}
    recorded = {**here, "torch": "2.3.4", "transformer-engine": "1.2"}
    # What an older version did not record is no difference.
    del recorded["triton"]
    monkeypatch.setattr(files, "package_versions", lambda: recorded)
    config = config_of()
    record = SavedRecord.now(Progress(6, 48, 768), Layout.from_config(config, 1))
    monkeypatch.setattr(files, "package_versions", lambda: here)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (line,) = start_lines(tmp_path, record, config, Layout.from_config(config, 1))[1:]
    assert line == (
        f"warning: it was written with torch 2.3.4 (now {here['torch']}), transformer-engine 1.2 "
        "(now none): the run may differ in bits from one without a break"
    )


def test_a_longer_run_names_the_jump_of_the_learning_rate(tmp_path):
    # From 1e-3 at step 2 in a line to 1e-4 at step 10, or at step 18.
    assert resumed(tmp_path, training={"train_iters": 18})[1:] == [
        "  training.train_iters: 18; before: 10",
        "  learning rate of step 7: 0.000719; before: 0.000438",
    ]
    fixed = {"train_iters": 18}
    lines = resumed(tmp_path, training=fixed, optimizer={"decay_iters": 10})
    assert not any("learning rate" in line for line in lines)


def test_layout_and_batch_are_named(tmp_path):
    lines = resumed(
        tmp_path,
        ranks=2,
        training={"global_batch_size": 16},
        parallel={"expert_model_parallel_size": 2},
    )
    layout = lines[1].split("; before: ")
    assert layout[0].startswith("  layout: ")
    assert " ep=2" in layout[0]
    assert " ep=1" in layout[1]
    assert lines[2:] == ["  training.global_batch_size: 16; before: 8"]


def test_routers_that_were_trained_for_something_else_are_a_warning(tmp_path):
    lines = resumed(tmp_path, moe={"router_topk": 1, "tau": 0.5, "balance_coeff": 0.02})
    assert len(lines) == 5
    assert lines[-1].startswith(
        "warning: moe.router_topk, moe.tau: tokens are routed in another way"
    )


def test_settings_are_compared_by_what_they_mean(tmp_path):
    saved = {"data": {"split": "0.98, 0.02, 0"}, "moe": {"layer_freq": [1, 1]}}
    same = {"data": {"split": "98,2,0"}, "moe": {"layer_freq": 1}}
    assert len(resumed(tmp_path, saved=saved, **same)) == 1
    fused = {"fused_single_qkv_rope": True}
    other = resumed(tmp_path, saved=saved, data={"split": "90,10,0"}, megatron=fused)
    assert other[1:] == [
        "  data.split: '90,10,0'; before: '0.98, 0.02, 0'",
        "  megatron.fused_single_qkv_rope: true; before: false",
    ]


def test_weights_alone_are_no_resumed_run(tmp_path):
    config = config_of()
    lines = start_lines(tmp_path, None, config, Layout.from_config(config, 1))
    assert lines == [f"started from the weights of {tmp_path}"]
