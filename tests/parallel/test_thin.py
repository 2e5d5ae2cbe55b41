"""`moepp thin`: from a model of others to its cheaper export, in one command that continues."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.cli import main
from moepp_megatron.config import load_config
from moepp_megatron.runtime.launch import STOPPED, LaunchOptions
from moepp_megatron.workbench.experiments import runner
from tests.interop.checkpoints import write_released
from tests.interop.test_upcycle import DEEPSEEK
from tests.parallel.checkpoint_runs import logged
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import join

STEPS = 16
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "router_aux_loss_coef": 0.02,
}
SOURCES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "Llama": {},
}
SETTINGS = [
    *("--steps", str(STEPS), "training.global_batch_size=8", "training.micro_batch_size=4"),
    *("training.eval_iters=1", "training.log_interval=1", "optimizer.lr=1e-3"),
    # Half of what the models are for.
    "model.seq_length=16",
    # Test ranks may not have children.
    "data.num_workers=0",
]


def train(path: str, *overrides: str) -> None:
    from moepp_megatron.training.checkpoint import list_checkpoints
    from moepp_megatron.training.run_folder import checkpoint_folder
    from moepp_megatron.training.trainer import Trainer

    config = load_config(path, overrides)
    if list_checkpoints(checkpoint_folder(config)):
        # As --resume does.
        again = ("checkpoint.load=auto", "checkpoint.load_optimizer=true")
        config = load_config(path, [*overrides, *again])
    layout = join(config)
    Trainer(config, layout).run()


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("sources")
    for family, fields in SOURCES.items():
        torch.manual_seed(5)
        config = getattr(transformers, f"{family}Config")(**SHAPE, **fields)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder / family)
        shutil.copy(corpus / "tokenizer.json", folder / family)
        (folder / family / "chat_template.jinja").write_text("{{ messages }}")
    write_released(folder / "released", vocab_size=320)
    return folder


@pytest.fixture
def thin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The command; returns its exit status and what it has printed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moepp", "thin", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


@pytest.mark.parametrize(
    ("family", "experts", "share"),
    [("Mixtral", 2, 0.5), ("Qwen3Moe", 4, 0.5), ("released", 2, 0.3)],
)
def test_from_a_model_to_its_export(
    ranks: RankPools, corpus: Path, sources, tmp_path, thin, monkeypatch, family, experts, share
) -> None:
    trained: list[str] = []
    stops = ["budget"]

    def on_test_ranks(options: LaunchOptions, module: str, arguments: list[str]) -> int:
        """The ranks that are there already; the training is stopped once."""
        assert options.stoppable, "Ctrl-C saves"
        name = Path(arguments[-1]).stem
        trained.append(name)
        if name in stops:
            stops.remove(name)
            ranks(1).run(train, arguments[-1], f"training.train_iters={STEPS // 2}")
            return STOPPED
        ranks(1).run(train, arguments[-1])
        return 0

    monkeypatch.setattr(runner, "run_ranks", on_test_ranks)
    words = [sources / family, tmp_path / "out", "--data", corpus, *SETTINGS]
    words += ["--ffn-share", share]
    status, said = thin(*words, "--dry-run")
    assert (status, said.count("moepp train "), (tmp_path / "out").exists()) == (0, 3, False)
    status, said = thin(*words)
    assert (status, trained) == (STOPPED, ["model", "budget-start", "budget"])
    assert "step 0       all data: loss " in said
    # What is there is not done again, the training continues.
    status, said = thin(*words)
    assert (status, trained[3:]) == (0, ["budget"]), said
    runs = tmp_path / "out/runs"
    before, after = (logged(runs / name, "valid_loss")[-1] for name in ("model", "budget-start"))
    # The tolerance of upcycling (tests/interop/test_upcycle.py), here of a mean.
    assert after == pytest.approx(before, abs=1e-5)
    assert logged(runs / "budget", "step") == list(range(1, STEPS + 1))
    # At the first step the model is its teacher.
    divergences = logged(runs / "budget", "distillation_loss")
    assert abs(divergences[0]) < 1e-5 < divergences[-1]
    shares = logged(runs / "budget", "ffn_fraction")
    late = sum(shares[-2:]) / 2
    if family == "released":
        # Its random gating residuals need more steps than these.
        assert late < shares[0] < 1.0
    else:
        # As near as the alert of a missed budget allows.
        assert (shares[0], late) == (1.0, pytest.approx(share, rel=0.1))
    page = (tmp_path / "out/thin.html").read_text()
    assert "Expert FLOP removed" in page
    # Steps of the model, of the start and of the training.
    assert [page.count(f'class="num">{steps}</td>') for steps in (0, STEPS)] == [2, 1]
    # A plot of the only validation set: from the start to the end.
    rises = [after / before - 1, logged(runs / "budget", "valid_loss")[-1] / before - 1]
    assert page.count("<img") == 1
    drawn = f'alt="budget: {rises[0]:.1%}, {rises[1]:.1%} at the end'
    assert drawn.replace("-0.0%", "0.0%") in page.replace("-0.0%", "0.0%")
    assert thin(*words)[0] == 0
    assert len(trained) == 4
    # What is exported is the last checkpoint: not one before, and not that of a shorter training.
    (tmp_path / "out/budget-hf").rename(tmp_path / "earlier")
    shutil.rmtree(runs / f"budget/checkpoints/step_{STEPS:08}")
    status, said = thin(*words)
    assert (status, trained[4:]) == (0, ["budget"]), said
    exported = tmp_path / "out/budget-hf/training_config.yaml"
    assert exported.read_text() == (tmp_path / "earlier/training_config.yaml").read_text()
    exported.write_text(exported.read_text() + "# other\n")
    status, said = thin(*words)
    assert (status, "is of an earlier training; move it away" in said) == (2, True)

    import torch

    from tests.interop.transformers_models import load_model

    # What a server needs besides is the model's own: its chat template, where answers end.
    files = {"chat_template.jinja", "generation_config.json"}
    for name in files & {file.name for file in (sources / family).iterdir()}:
        own = (sources / family / name).read_bytes()
        assert (tmp_path / "out/budget-hf" / name).read_bytes() == own
    own, thinned = (
        json.loads((folder / "config.json").read_text())
        for folder in (sources / family, tmp_path / "out/budget-hf")
    )
    for name in ("eos_token_id", "max_position_embeddings"):
        assert thinned[name] == own[name]
    model = load_model(tmp_path / "out/budget-hf")
    assert model.config.num_experts_per_tok == experts
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(32).view(1, 32)).logits).all()


def test_what_recipes_train(corpus: Path, sources: Path, tmp_path: Path) -> None:
    from moepp_megatron.interop.checkpoint_reader import CheckpointReader
    from moepp_megatron.interop.thin import ThinModels
    from moepp_megatron.interop.to_hf import mcore_to_hf
    from moepp_megatron.training.thin import RECIPES, ThinSettings

    settings = ThinSettings(tmp_path, 0.5, [corpus, corpus.parent], steps=500)
    runs = {}
    for recipe in RECIPES:
        models = ThinModels.read(sources / "Qwen3Moe", tmp_path, recipe)
        runs |= settings.runs(recipe, models.model, models.start)
        assert models.keeps_function == (recipe in ("budget", "control"))
    lasts = [runs[recipe] for recipe in RECIPES]
    # The same text, and the same teacher, which is no other model.
    assert {str(run.data) for run in lasts} == {str(runs["budget"].data)}
    assert {run.distillation.teacher for run in lasts} == {str(tmp_path / "model")}
    # None of them has more to learn with than the others.
    assert not any(run.moe.gating_residual for run in runs.values())
    assert set(runs["budget"].data.validation) == {corpus.name, corpus.parent.name}
    moe, budget = runs["budget"].moe, runs["budget"].moe.budget
    # Copies of the input cost more than they help (docs/evidence.md).
    added = (moe.num_zero_experts, moe.num_copy_experts, moe.num_constant_experts)
    assert added == (4, 0, 0)
    # A tenth of the file's 5000 steps, the ramp too.
    assert (budget.start_ffn_per_token, budget.target_ffn_per_token) == (4.0, 2.0)
    assert (budget.ramp_steps, runs["budget"].optimizer.warmup_iters) == (125, 10)
    assert runs["budget"].moe.balance_coeff == 0.02
    first, second = runs["zeda-1"], runs["zeda"]
    assert (second.moe.num_zero_experts, second.moe.tau, second.moe.ffn_share) == (4, 0.5, 0.5)
    assert second.moe.balance_loss == "grouped"
    assert not second.moe.selection_bias
    assert first.training.train_iters + second.training.train_iters == 500
    assert (first.distillation.teacher, second.distillation.text_weight) == (None, 0.0)
    assert second.checkpoint.load == str(first.run.dir)
    assert (runs["topk"].moe.router_topk, runs["control"].moe.router_topk) == (2, 4)
    # ZEDA's router rows are as the FFN experts', and no bias holds them back.
    models = ThinModels.read(sources / "Qwen3Moe", tmp_path, "zeda")
    models.convert()
    start = CheckpointReader(tmp_path / "zeda-start")
    rows = start.read("decoder.layers.1.mlp.router.weight")
    assert not any("expert_bias" in key for key in start.tensors)
    assert rows.shape == (12, 32)
    assert 0.5 < float(rows[8:].std() / rows[:8].std()) < 2.0
    # A model without new experts is one that every server has.
    assert mcore_to_hf(models.model.checkpoint, tmp_path / "hf", "vanilla") == []
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "qwen3_moe"
    # What is measured is left as it is.
    for name in ("model", "budget-start"):
        assert not runs[name].moe.budget.acts
        assert runs[name].checkpoint.save_interval == 0


@pytest.mark.parametrize(
    ("source", "words", "said"),
    [
        ("none", [], "none) must be a folder; name that of a model"),
        ("Llama", [], "must be a mixture of experts, and is a dense llama"),
        ("Mixtral", ["--ffn-share", "1"], "--ffn-share (1) must be above 0 and below 1"),
        ("released", [], "--ffn-share (0.5) must be below that of MODEL (0.429)"),
        ("Mixtral", ["--recipe", "best"], "--recipe (best) must be one of budget, zeda"),
        ("Qwen3Moe", ["--recipe", "topk", "--ffn-share", "0.3"], "moe.router_topk (1.2) must be a"),
        ("Mixtral", ["--data", "SOURCES"], "data.path (SOURCES) must"),
        ("Mixtral", ["training.eval_iters=0"], "training.eval_iters (0) must be above 0"),
        ("Mixtral", ["checkpoint.save_interval=0"], "save_interval (0) must be above 0"),
        ("Mixtral", ["checkpoint.dir=there"], "checkpoint.dir ('there') must be null"),
        ("Mixtral", ["optimizer.lr=1e-6"], "optimizer.min_lr (5e-06) must be at most"),
        ("sigmoid", ["--recipe", "zeda"], "--recipe (zeda) must be another one for MODEL"),
        ("other tokens", [], "whose ids must mean the tokens that"),
        ("few tokens", [], "model.vocab_size (128) must hold every token of data.path"),
    ],
)
def test_one_line_says_what_is_wrong(corpus, sources, tmp_path, thin, source, words, said) -> None:
    for name, change in (("other tokens", {}), ("few tokens", {"vocab_size": 128})):
        shutil.copytree(sources / "Mixtral", tmp_path / name)
        fields = json.loads((tmp_path / name / "config.json").read_text()) | change
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    (tmp_path / "few tokens/tokenizer.json").unlink()
    (tmp_path / "sigmoid").mkdir()
    fields = {**SHAPE, **DEEPSEEK, "model_type": "deepseek_v3", "rms_norm_eps": 1e-6}
    (tmp_path / "sigmoid/config.json").write_text(json.dumps(fields))
    file = tmp_path / "other tokens/tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(tokens))
    model = next(f for f in (tmp_path / source, sources / source) if f.exists() or source == "none")
    data = [] if "--data" in words else ["--data", corpus]
    words = [str(word).replace("SOURCES", str(sources)) for word in [*data, *SETTINGS, *words]]
    status, printed = thin(model, tmp_path / "out", *words)
    assert status == 2
    assert said.replace("SOURCES", str(sources)) in printed
    assert not (tmp_path / "out").exists()


def test_a_folder_is_of_one_model_and_share(sources: Path, tmp_path: Path) -> None:
    from moepp_megatron.config import ConfigError
    from moepp_megatron.interop.thin import ThinModels

    mixtral, other = (
        ThinModels.read(sources / name, tmp_path / "out", "budget") for name in list(SOURCES)[:2]
    )
    mixtral.claim(0.5)
    mixtral.claim(0.5)
    with pytest.raises(ConfigError, match="same --ffn-share"):
        mixtral.claim(0.4)
    with pytest.raises(ConfigError, match="same MODEL"):
        other.claim(0.5)
    with pytest.raises(ConfigError, match="must be new .* holds other files"):
        ThinModels.read(sources / "Mixtral", sources, "budget").claim(0.5)
    assert not (sources / "configs").exists()
    # Another training of the model: the same sizes.
    shutil.copytree(sources / "Mixtral", tmp_path / "tuned")
    weights = tmp_path / "tuned/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"tune")
    with pytest.raises(ConfigError, match="same MODEL"):
        ThinModels.read(tmp_path / "tuned", tmp_path / "out", "budget").claim(0.5)


def test_what_a_file_of_out_decides_is_said(sources, corpus, tmp_path, monkeypatch) -> None:
    from moepp_megatron.config import ConfigError
    from moepp_megatron.interop.thin import ThinModels
    from moepp_megatron.training import thin as module
    from moepp_megatron.workbench.experiments.thin_run import ThinRun

    def settled(*overrides: str) -> tuple[dict[str, Any], list[str]]:
        settings = module.ThinSettings(tmp_path, 0.5, [corpus], overrides=overrides)
        runs = settings.runs("budget", models.model, models.start)
        return settings.settled(runs, "moepp thin")

    models = ThinModels.read(sources / "Mixtral", tmp_path, "budget")
    models.claim(0.5)
    assert settled()[1] == []
    # Also settings that change no result: somebody may wait for them to help.
    runs, warnings = settled("parallel.expert_model_parallel_size=2")
    assert runs["budget"].parallel.expert_model_parallel_size == 1
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "parallel.expert_model_parallel_size is 1 there and 2 in this command; change the file, or "
        "delete it"
    ]
    monkeypatch.setattr(runner, "lock", lambda descriptor: False)
    with pytest.raises(ConfigError, match=r"^OUT \(.*one command at a time"):
        runner.run_missing([ThinRun(tmp_path, "budget", "budget", 1, runs["budget"])])
    monkeypatch.setattr(module, "SETTINGS_FILE", tmp_path / "not in a wheel")
    with pytest.raises(ConfigError, match="--config must name a file .* no configs/"):
        settled()
