"""`moepp thin`: makes a trained model take fewer FFN experts, and shows what that costs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.cli.options import OverridesArgument
from moepp_megatron.config import ConfigError, load_config

if TYPE_CHECKING:
    from moepp_megatron.interop.thin import ThinModels
    from moepp_megatron.workbench.experiments.thin_run import ThinRun


def thin(
    model: Annotated[
        Path,
        typer.Argument(
            help="Make this model cheaper: a Mixtral, a Qwen3-MoE, a released MoE++ model, or a "
            "MoE++ checkpoint of ours.",
            metavar="MODEL",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Write to this folder; a second call continues.", metavar="OUT"),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Train on this prepared folder; of several each is a validation set, too.",
            metavar="DIR",
        ),
    ],
    overrides: OverridesArgument = None,
    ffn_share: Annotated[
        float,
        typer.Option(help="Leave this share of a token's FFN experts.", metavar="SHARE"),
    ] = 0.5,
    recipe: Annotated[
        str,
        typer.Option(
            help="Train by this recipe: budget; to compare in the same OUT zeda (its grouped loss "
            "and stages), topk (fewer experts per token) or control (the model as it is).",
            metavar="NAME",
        ),
    ] = "budget",
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Train for this many steps; by default, for those of --config."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Take learning rate, batch, ramp and layout from this file; by default, "
            "configs/upcycle/_recipe.yaml.",
            metavar="FILE",
        ),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Start this many ranks on this machine.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, sizes and commands, and stop.")
    ] = False,
) -> None:
    """Make a trained model cheaper: upcycle, distill under a falling budget, export.

    New experts are added so that the function is kept; then the budget of FFN experts falls, and
    the model learns from the text and, by reverse KL, from the model that it was. A stage that is
    there is not done again. OUT/configs holds what is trained, which may be changed before.
    OUT/thin.html shows FLOP removed against loss.

    Examples:
        moepp thin mixtral thinned --data prose --data code --ffn-share 0.5 --nproc 8
        moepp thin mixtral thinned --data prose --data code --recipe zeda --nproc 8
    """
    if not 0 < ffn_share < 1:
        raise ConfigError(f"--ffn-share ({ffn_share:g}) must be above 0 and below 1; use 0.5")
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    from moepp_megatron.interop.thin import ThinModels
    from moepp_megatron.training.thin import ThinSettings
    from moepp_megatron.workbench.experiments.thin_run import ThinRun

    models = ThinModels.read(model, out.resolve(), recipe)
    settings = ThinSettings(models.out, ffn_share, data, config, steps, overrides or [])
    configs = settings.runs(recipe, models.model, models.start)
    for warning in models.check(configs[recipe], nproc):
        echo(f"warning: {warning}", err=True)
    if dry_run:
        echo("\n".join(settings.lines(configs, nproc)))
        echo(f"export       {models.export}")
        return
    models.claim(ffn_share)
    command = shlex.join(["moepp", *sys.argv[1:]])
    configs, others = settings.settled(configs, command)
    for warning in others:
        echo(f"warning: {warning}", err=True)
    echo(f"settings     {out}/configs")
    models.convert()
    _run(models, [ThinRun(models.out, name, name, nproc, each) for name, each in configs.items()])
    _finish(models, command)


def _run(models: ThinModels, runs: Sequence[ThinRun]) -> None:
    from moepp_megatron.runtime.launch import STOPPED
    from moepp_megatron.workbench.experiments.runner import Interrupted, RunFailed, run_missing
    from moepp_megatron.workbench.report.thin_page import at_step_0

    try:
        run_missing(runs[:2], lambda name: echo(f"measuring    {name}"))
        same, losses = at_step_0(*(run.result() for run in runs[:2]))
        echo(f"step 0       {losses}")
        if models.keeps_function and not same:
            raise RunFailed(f"{runs[1].name} must compute what MODEL does, and has {losses}")
        run_missing(runs[2:], lambda name: echo(f"training     {name}; see {models.out}/logs"))
    except Interrupted as stop:
        echo(str(stop), err=True)
        raise typer.Exit(STOPPED) from None
    except RunFailed as failure:
        echo(f"error: {failure}", err=True)
        raise typer.Exit(1) from None


def _finish(models: ThinModels, command: str) -> None:
    from moepp_megatron.training.thin import RECIPES, last_record
    from moepp_megatron.workbench.report.terminal import print_uncut, table_of
    from moepp_megatron.workbench.report.thin_page import write_thin_page

    runs = models.out / "runs"
    names = ["model", *(f"{name}{end}" for name in RECIPES for end in ("-start", "-1", ""))]
    files = {name: models.out / "configs" / f"{name}.yaml" for name in names}
    there = {
        name: runs / name
        for name, file in files.items()
        if file.exists() and last_record(load_config(file))
    }
    page = models.out / "thin.html"
    print_uncut(table_of(write_thin_page(page, there, models.folder.resolve().name, command)))
    echo(f"page         {page}")
    for warning in models.exported():
        echo(f"warning: {warning}", err=True)
    echo(f"model        {models.export}")
