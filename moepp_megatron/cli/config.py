"""`moepp config`: what a configuration sets and where, and every setting that there is."""

import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from moepp_megatron.cli.echo import echo, warn
from moepp_megatron.cli.options import ConfigArgument, JsonOption, OverridesArgument
from moepp_megatron.config import ConfigError

app = typer.Typer(
    help="""Show a configuration, and explain its settings.

    Examples:
        moepp config show configs/quickstart.yaml
        moepp config keys moe.tau
    """
)

_WIDTH = 100


@app.command("show")
def _show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    changed: Annotated[bool, Option("--changed", help="Leave out what is at its default.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Print the resolved configuration with the file that each value comes from.

    What is printed is YAML that `moepp train` reads.

    Examples:
        moepp config show configs/quickstart.yaml moe.tau=0.5 --changed
        moepp config show configs/models/moepp_7b_16_4.yaml --json resolved.json
    """
    from moepp_megatron.config.load import DEFAULT, config_with_origins, nested

    values = config_with_origins(config, overrides or [])
    if changed:
        values = [value for value in values if value[2] != DEFAULT]
    if json_file is not None:
        from moepp_megatron.runtime.atomic import write_json

        content = nested(
            (names, {"value": value, "origin": origin}) for names, value, origin in values
        )
        write_json(json_file, content)
        echo(f"configuration {json_file}")
        return
    lines = list(_yaml_lines(values))
    width = min(max((len(line) for line, _ in lines), default=0), 60)
    for line, origin in lines:
        echo(line if origin is None else f"{line:<{width}}  # {origin}")


@app.command("keys")
def _keys(
    prefix: Annotated[
        str | None,
        Argument(
            help="Print only the settings whose names begin with this, such as moe or moe.tau; if "
            "none does, those that contain it.",
            metavar="PREFIX",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Print every setting: type, default, unit, allowed values and meaning.

    Examples:
        moepp config keys moe.budget
        moepp config keys --json keys.json
    """
    from dataclasses import asdict

    from moepp_megatron.config.reference import section_references

    settings = [setting for section in section_references() for setting in section.settings]
    wanted = prefix or ""
    matching = [one for one in settings if one.name.startswith(wanted)]
    matching = matching or [one for one in settings if wanted in one.name]
    if not matching:
        from moepp_megatron.config.mistakes import nearest_setting

        sections = ", ".join(dict.fromkeys(one.name.partition(".")[0] for one in settings))
        near = nearest_setting(wanted)
        remedy = f"use a section ({sections})" if near is None else f"did you mean {near}?"
        raise ConfigError(
            f"PREFIX ({wanted}) must be the beginning or a part of a setting's name; {remedy}"
        )
    if json_file is not None:
        from moepp_megatron.runtime.atomic import write_json

        write_json(json_file, [asdict(one) for one in matching])
        echo(f"settings     {json_file}")
        return
    for one in matching:
        default = "must be given" if one.default is None else f"default {one.default}"
        unit = [] if one.unit in ("1", "-") else [f"in {one.unit}"]
        limits = [] if one.kind == "true or false" or not one.allowed else [", ".join(one.allowed)]
        echo("; ".join([f"{one.name}: {one.kind}", *unit, *limits, default]))
        echo(_paragraph(f"{one.meaning}."))


@app.command("from-megatron")
def _from_megatron(
    file: Annotated[
        Path,
        Argument(
            help="Read this shell script, which calls pretrain_gpt.py, or YAML with its arguments.",
            metavar="FILE",
        ),
    ],
    variables: Annotated[
        list[str] | None,
        Argument(help="Give variables of FILE these values.", metavar="NAME=VALUE"),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            help="Write the configuration to this file; by default, it is printed.",
            metavar="FILE.yaml",
        ),
    ] = None,
) -> None:
    """Turn a Megatron-LM command line into a configuration, and list what has no counterpart.

    Nothing in FILE is run.

    Examples:
        moepp config from-megatron train_mixtral.sh TP=2 --out mine.yaml
    """
    from moepp_megatron.config.from_megatron import translate

    values: dict[str, str] = {}
    for text in variables or []:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError(f"{text!r} must have the form NAME=VALUE; write for example TP=2")
        values[name] = value
    translation = translate(file, values)
    content = translation.to_yaml(file)
    if out is None:
        echo(content.rstrip("\n"))
        return
    from moepp_megatron.runtime.atomic import write_result

    write_result(out, content.encode())
    warn(*translation.notes)
    echo(f"configuration {out}")


def _paragraph(text: str) -> str:
    indent = " " * 4
    return textwrap.fill(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _yaml_lines(
    values: Iterable[tuple[tuple[str, ...], Any, str]],
) -> Iterator[tuple[str, str | None]]:
    """Each line of the YAML, with the origin of its value or None for a section's name."""
    import yaml

    above: list[str] = []
    for (*sections, name), value, origin in values:
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                yield f"{'  ' * depth}{section}:", None
        above = sections
        # A value in one line, a list of sections too; a scalar ends with YAML's end of document.
        text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
        text = text.strip().removesuffix("...").strip()
        yield f"{'  ' * len(sections)}{name}: {text}", origin
