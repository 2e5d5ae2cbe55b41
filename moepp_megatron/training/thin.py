"""The runs of `moepp thin`: a model in training that comes to take fewer FFN experts.

Each recipe trains alike: on the text and, by reverse KL, towards the frozen model that it was.
`budget` lets the budget of FFN experts fall. The others are for comparison: `zeda` has ZEDA's
grouped loss and its two stages, `topk` fewer experts per token, `control` changes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config import (
    Config,
    ConfigError,
    checkpoint_bytes,
    count_parameters,
    load_config,
    parse_config,
    with_overrides,
)
from moepp_megatron.config.blends import with_whole_paths
from moepp_megatron.config.choices import pick
from moepp_megatron.config.load import config_layers, from_dotted, merge, overriding_sections
from moepp_megatron.config.origins import leaves
from moepp_megatron.config.problem import raise_problems, show
from moepp_megatron.config.rules.rows import refuse
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, StepMetrics, read_metrics
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.training.checkpoint import list_checkpoints
from moepp_megatron.training.checkpoint.files import checkpoint_step, plain_damage
from moepp_megatron.training.checkpoint.find import first_valid
from moepp_megatron.training.run_folder import checkpoint_folder

# Learning rate, steps and ramp of upcycled models (docs/how_to/upcycle.md).
SETTINGS_FILE = Path(__file__).resolve().parents[2] / "configs" / "upcycle" / "_recipe.yaml"
# Of a published model's 32,768 and more, as in configs/upcycle/.
_LONGEST = 4096
# Given in steps of the whole training.
_OF_THE_STEPS = (
    *("optimizer.warmup_iters", "moe.budget.ramp_steps"),
    *("training.eval_interval", "checkpoint.save_interval"),
)
# A step that changes no weight: the validation after it is that of the checkpoint.
_MEASURE = (
    *("training.train_iters=1", "training.eval_interval=0", "checkpoint.save_interval=0"),
    *("optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.weight_decay=0"),
    *("optimizer.warmup_iters=0", "distillation.teacher=null", "moe.budget=null"),
)
# What would be noticed at the end only.
_RULES = (
    refuse(
        "training.eval_iters",
        lambda c: c.training.eval_iters == 0,
        "must be above 0, because losses on validation sets are what moepp thin shows",
        "use 8",
    ),
    refuse(
        "checkpoint.save_interval",
        lambda c: c.checkpoint.save_interval == 0,
        "must be above 0, because moepp thin exports the last checkpoint",
        "use training.train_iters for no other",
    ),
    refuse(
        "checkpoint.dir",
        lambda c: c.checkpoint.dir is not None,
        "must be null, because each run of OUT has its own checkpoints",
        "choose another OUT",
    ),
)
# Of ZEDA's steps: 60,000 answers in batches of 128, then 321 steps of the second stage.
_ZEDA_FIRST = 469 / (469 + 321)


@dataclass(frozen=True)
class Start:
    """What a recipe starts from.

    Attributes:
        checkpoint: Its folder, which need not be there yet.
        model: The sections `model`, `moe` and `precision`.
        ffn_share: FFN experts' share of the selections there.
    """

    checkpoint: Path
    model: Config
    ffn_share: float


def last_record(config: Config) -> StepMetrics | None:
    """The last record of a run; None until its last step is done and saved."""
    steps, folder = config.training.train_iters, checkpoint_folder(config)
    try:
        record: StepMetrics = read_metrics(Path(config.run.dir) / METRICS_FILE)[-1]
    except MetricsError:
        return None
    if config.checkpoint.save_interval:
        newest, _ = first_valid(list_checkpoints(folder), plain_damage)
        if newest is None or checkpoint_step(newest) < steps:
            return None
    return record if record.step >= steps else None


@dataclass(frozen=True)
class ThinSettings:
    """What is the same for all recipes.

    Attributes:
        out: Folder in whose `runs` they are, absolute.
        share: Part of the selected experts that are to be FFN experts.
        data: Prepared folders, trained on alike; of several each is validated by its name.
        file: Settings of training, but of the model; None: as upcycled models are trained.
        steps: Steps; None for the file's.
        overrides: `section.key=value`.
    """

    out: Path
    share: float
    data: Sequence[Path]
    file: Path | None = None
    steps: int | None = None
    overrides: Sequence[str] = ()

    def runs(self, recipe: str, model: Start, start: Start) -> dict[str, Config]:
        """All runs by name: the losses of the model and of the start, and the training.

        Raises:
            ConfigError: No such recipe, or settings that cannot be trained with.
        """
        own = self._config("control", model, model)
        config = self._config(recipe, model, start)
        runs: dict[str, tuple[Config, Sequence[str]]]
        raise_problems(problem for rule in _RULES for problem in rule(config))
        runs = {"model": (own, _MEASURE), f"{recipe}-start": (config, _MEASURE)}
        stages = _STAGES[recipe](config, self.out) if recipe in _STAGES else {recipe: []}
        runs |= {name: (config, changes) for name, changes in stages.items()}
        return {
            name: with_overrides(
                base, [*changes, f"run.dir={self.out}/runs/{name}", f"run.name={name}"]
            )
            for name, (base, changes) in runs.items()
        }

    def settled(
        self, runs: Mapping[str, Config], command: str
    ) -> tuple[dict[str, Config], list[str]]:
        """The runs as their files in OUT say, which a user may have changed; writes absent ones.

        `command` is named in the files. ConfigError: a file is no configuration.

        Returns:
            The runs, and a warning for each setting that is another one there.
        """
        files = {name: self.out / "configs" / f"{name}.yaml" for name in runs}
        for name, file in files.items():
            if not file.exists():
                write_atomic(file, runs[name].to_yaml(command).encode())
        there = {name: load_config(file) for name, file in files.items()}
        others: dict[str, str] = {}
        for name, wanted in runs.items():
            found = dict(leaves(there[name].model_dump(mode="json")))
            for names, value in leaves(wanted.model_dump(mode="json")):
                if found.get(names) != value:
                    setting = ".".join(names)
                    warning = (
                        f"{files[name]} decides: {setting} is {show(found.get(names))} there and "
                        f"{show(value)} in this command; change the file, or delete it"
                    )
                    others.setdefault(setting, warning)
        return there, list(others.values())

    def lines(self, runs: Mapping[str, Config], nproc: int) -> list[str]:
        """The size of the model, the checkpoints before training, and the command of each run."""
        model, start, *_, config = runs.values()
        size = f"{count_parameters(config).total:,} parameters with new experts"
        lines = [f"model        {size}, {checkpoint_bytes(config) / 1e9:.3g} GB a checkpoint"]
        checkpoints = dict.fromkeys((model.checkpoint.load, start.checkpoint.load))
        lines += [f"convert      {checkpoint}" for checkpoint in checkpoints]
        for name, config in runs.items():
            words = ["moepp", "train", f"{self.out}/configs/{name}.yaml", "--resume"]
            count = config.training.train_iters
            steps = f"{count:,} step{'s' if count > 1 else ''}"
            lines.append(f"{steps:<12} {shlex.join([*words, '--nproc', str(nproc)])}")
        return lines

    def _config(self, recipe: str, model: Start, start: Start) -> Config:
        if self.file is None and not SETTINGS_FILE.exists():
            raise ConfigError(
                "--config must name a file of training settings, because this installation has no "
                "configs/ to take them from; copy configs/upcycle/_recipe.yaml of the repository"
            )
        content: dict[str, Any] = {}
        for _, layer in config_layers(self.file or SETTINGS_FILE):
            content = merge(content, layer)
        settings = {
            "run.dir": "unused",
            "model.seq_length": min(start.model.model.seq_length, _LONGEST),
            "distillation.teacher": str(model.checkpoint),
            "distillation.divergence": "reverse_kl",
            "checkpoint.load": str(start.checkpoint),
            "checkpoint.load_optimizer": False,
            **self._scaled(content),
            **self._data(),
            **pick(_RECIPES, "--recipe", recipe)(start, self.share),
        }
        whole = start.model.model_dump(mode="json", exclude_unset=True)
        if "moe.budget.controller" not in settings:
            for moe in (content.get("moe", {}), whole["moe"]):
                moe.pop("budget", None)
            settings.pop("moe.budget.ramp_steps", None)
        for section in ("model", "moe", "precision"):
            content = merge(content, {section: whole.get(section, {})})
        content = merge(content, from_dotted(settings))
        config = parse_config(merge(content, overriding_sections(self.overrides)))
        return config.model_copy(update={"data": with_whole_paths(config.data)})

    def _data(self) -> dict[str, Any]:
        if len(self.data) == 1:
            return {"data.path": str(self.data[0])}
        parts = [{"path": str(folder), "weight": 1.0} for folder in self.data]
        by_name = {folder.resolve().name: str(folder) for folder in self.data}
        if len(by_name) < len(parts):
            names = ", ".join(map(str, self.data))
            raise ConfigError(f"--data ({names}) must have different names; rename one of them")
        return {"data.path": None, "data.blend": parts, "data.validation": by_name}

    def _scaled(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Steps, and what is given as a part of them."""
        if self.steps is None:
            return {}
        given = {".".join(map(str, names)): value for names, value in leaves(content)}
        scale = self.steps / given.get("training.train_iters", self.steps)
        parts = {name: given[name] for name in _OF_THE_STEPS if given.get(name)}
        scaled = {name: max(1, round(value * scale)) for name, value in parts.items()}
        return {"training.train_iters": self.steps, **scaled}


def _budget(start: Start, share: float) -> dict[str, Any]:
    topk = start.model.moe.router_topk
    if share >= start.ffn_share:
        raise ConfigError(
            f"--ffn-share ({share:g}) must be below that of MODEL ({start.ffn_share:.3g}); use less"
        )
    return {
        "moe.budget.controller": "bias",
        "moe.budget.start_ffn_per_token": start.ffn_share * topk,
        "moe.budget.target_ffn_per_token": share * topk,
    }


def _zeda(start: Start, share: float) -> dict[str, Any]:
    # Of ZEDA's scripts/train_zeda_qwen_sft.sh.
    return {
        "moe.tau": start.model.moe.tau_for(share),
        "moe.balance_loss": "grouped",
        "moe.balance_coeff": 0.1,
        "optimizer.adam_beta2": 0.98,
        "optimizer.min_lr": 0.0,
    }


def _zeda_stages(config: Config, out: Path) -> dict[str, list[str]]:
    steps, lr = config.training.train_iters, config.optimizer.lr
    first = max(1, round(steps * _ZEDA_FIRST))
    return {
        # On the text, for the teacher's answers are not sampled here.
        "zeda-1": [
            *("distillation.teacher=null", f"training.train_iters={first}"),
            f"optimizer.warmup_iters={first // 10}",
        ],
        "zeda": [
            *("distillation.text_weight=0", f"training.train_iters={max(1, steps - first)}"),
            *(f"checkpoint.load={out}/runs/zeda-1", "optimizer.decay_style=constant"),
            *(f"optimizer.lr={lr / 4}", "optimizer.warmup_iters=0"),
        ],
    }


def _topk(start: Start, share: float) -> dict[str, Any]:
    topk = share * start.model.moe.router_topk
    # What is no whole number is refused with the configuration.
    return {"moe.router_topk": int(topk) if topk.is_integer() else topk}


_RECIPES = {
    "budget": _budget,
    "zeda": _zeda,
    "topk": _topk,
    "control": lambda start, share: {},
}
RECIPES = tuple(_RECIPES)
# Changes in each run of a training in several; the last one has the recipe's name.
_STAGES = {"zeda": _zeda_stages}
