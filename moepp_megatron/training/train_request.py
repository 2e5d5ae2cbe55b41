"""A request of `moepp train`, checked before anything heavy is imported."""

import base64
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from moepp_megatron.config import (
    Config,
    ConfigError,
    Layout,
    UnfitError,
    check_config,
    check_world_size,
    load_config,
    parse_config,
    with_overrides,
)
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.config.plugins import check_plugins, load_plugin
from moepp_megatron.config.sections import used
from moepp_megatron.features.registry import FILE_CHECKS, START_CHECKS, named
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.observe.status import RunStatus
from moepp_megatron.runtime.launch import LaunchOptions, has_launcher
from moepp_megatron.runtime.nodes import interface_of_rank
from moepp_megatron.runtime.object_store import check_store, place
from moepp_megatron.runtime.optional import have_wandb, how_to_install
from moepp_megatron.runtime.rank import RankEnvironment, environment
from moepp_megatron.runtime.rank_environment import contradiction, set_rank_variables
from moepp_megatron.training.checkpoint.compatible import differences
from moepp_megatron.training.checkpoint.find import check_start, list_checkpoints
from moepp_megatron.training.run_folder import RunFolder, Start, checkpoint_folder

Say = Callable[[str], object]
# The configuration that a launcher has resolved, for its ranks: files may be edited meanwhile.
RESOLVED = "MOEPP_RESOLVED"


@dataclass(frozen=True)
class TrainRequest:
    """A request to train `config`, checked.

    Attributes:
        rank: This process among the ranks; a lone one where it is to start them.
        options: The ranks to start on this machine, unless another launcher has started them.
        words: CONFIG and overrides as on the command line, for the ranks that are to start.
        loads: `config` with the `checkpoint` that this start loads: the run's own if it is resumed.
    """

    config: Config
    layout: Layout
    rank: RankEnvironment
    options: LaunchOptions
    start: Start
    words: list[str]
    loads: Config

    @classmethod
    def read(
        cls,
        config: Config | Path,
        overrides: Sequence[str],
        options: LaunchOptions,
        start: Start,
        warn: Say,
    ) -> "TrainRequest":
        """Check configuration and rank grid; ConfigError if anything is wrong with them.

        Args:
            config: A configuration, or its YAML file. A rank takes what its launcher has resolved,
                and a start that continues what the same job has begun what it began with.
            overrides: Settings `section.key=value` over it.
            options: The ranks that are to start; one without anything else is this process itself.
            start: Options that the user has set; the others are filled in here.
            warn: Called with warnings, in one process of the run.
        """
        nodes = options.nodes
        # As a launcher it is not one of srun's ranks, though srun may have started several.
        rank = RankEnvironment.read() if nodes is None else RankEnvironment()
        rank.check_nproc(options.num_local_ranks)
        file = None if isinstance(config, Config) else config
        handed = _handed_over()
        settings = handed or _given(config, overrides)
        name = nodes.run_id if nodes is not None else rank.start_name
        folder, changed = RunFolder(settings), ""
        restarted = rank.restart_count > 0 or folder.is_requeued(name)
        if restarted and handed is None and (begun := folder.begun()) is not None:
            changed = ", ".join(name for name, _, _ in differences(begun, settings, all_of=True))
            settings = begun
        machines = 1 if nodes is None else nodes.count
        world_size = rank.world_size if rank.is_launched else machines * options.num_local_ranks
        layout = Layout.from_config(settings, world_size)
        check_plugins(settings)
        start = replace(start, name=name, config_file=file, restarted=restarted)
        words = [str(file or "CONFIG"), *overrides]
        request = cls(settings, layout, rank, options, start, words, settings)
        if request.speaks:
            if changed:
                warn(
                    f"{words[0]} has changed since this run began: {changed}; it continues as it "
                    f"began ({folder.path / CONFIG_FILE}); end and resume it to take the change"
                )
            for warning in check_config(settings) + check_world_size(settings, world_size):
                warn(warning)
        return request

    @property
    def speaks(self) -> bool:
        """True if this process prints what all processes of the run find."""
        nodes = self.options.nodes
        return self.rank.rank == 0 and (nodes is None or not nodes.rank)

    @property
    def leads(self) -> bool:
        """True if this process is known to be the one that decides about the run's folder."""
        nodes = self.options.nodes
        return self.rank.rank == 0 if nodes is None else nodes.rank == 0

    @property
    def starts_ranks(self) -> bool:
        """True if this process starts ranks and is not one itself."""
        return not self.rank.is_launched and self.options != LaunchOptions(1, stoppable=True)

    def admitted(self, warn: Say) -> "TrainRequest":
        """Return the request with what it starts from, where folder, machine and data allow it.

        ConfigError if the folder holds a run, or data or checkpoint do not fit; UnfitError if this
        machine cannot do it.
        """
        config = self.config
        if self.rank.local_rank == 0 and not has_launcher():
            _check_stores(config)
        start = self._resolved_start()
        if self.leads and RunStatus.inherited() is None:
            # At once; looking for packages imports torch.
            RunFolder(config).refuse_occupied(start)
        speaks_first = self.speaks and not has_launcher()
        if speaks_first and (doubt := contradiction(config, os.environ)) is not None:
            warn(doubt)
        if not self.starts_ranks:
            set_rank_variables(config, interface_of_rank(self.rank))
        from moepp_megatron.data.prepared_data import check_data
        from moepp_megatron.runtime.fit import check_fit

        check_fit(config)
        for _, gpu in used(config, "gpu"):
            load_hardware(gpu)
        if self.speaks:
            _check_sinks(config)
        warnings = check_data(config, whole_index=self.rank.rank == 0)
        if speaks_first:
            for check in named(START_CHECKS):
                check(config)
            for warning in warnings:
                warn(warning)
        for check in named(FILE_CHECKS):
            check(config)
        loads = _resumed(config) if start.resume else config
        if not (start.overwrite and loads.checkpoint.load == "auto"):
            check_start(loads, checkpoint_folder(config))
        return replace(self, start=start, loads=loads)

    def handing_over(self) -> AbstractContextManager[None]:
        """Context: ranks that are started take this configuration."""
        content = json.dumps(self.config.model_dump(mode="json", exclude_unset=True)).encode()
        # Compressed, since Linux takes 128 KiB of a variable.
        return environment(**{RESOLVED: base64.b64encode(zlib.compress(content)).decode()})

    def _resolved_start(self) -> Start:
        """Start options, adjusted to the run's earlier start and its settings."""
        start, checkpoint = self.start, self.config.checkpoint
        overwrite = start.overwrite and not start.restarted
        goes_on_by_itself = checkpoint.load == "auto" and checkpoint.load_optimizer
        resume = start.resume or start.restarted or (goes_on_by_itself and not overwrite)
        return replace(start, resume=resume, overwrite=overwrite)


def _handed_over() -> Config | None:
    # Taken once, since a rank may start a run of its own.
    if (text := os.environ.pop(RESOLVED, None)) is None:
        return None
    return parse_config(json.loads(zlib.decompress(base64.b64decode(text))))


def _given(config: Config | Path, overrides: Sequence[str]) -> Config:
    if isinstance(config, Config):
        return with_overrides(config, overrides)
    return load_config(config, overrides)


def _resumed(config: Config) -> Config:
    """`config` that starts from the run's own newest checkpoint, if there is one."""
    checkpoints = list_checkpoints(checkpoint_folder(config))
    # Without anything else to start from, `auto` decides, on all ranks together.
    if config.checkpoint.load is not None and not checkpoints:
        return config
    return with_overrides(config, ["checkpoint.load=auto", "checkpoint.load_optimizer=true"])


def _check_stores(config: Config) -> None:
    """Refuse addresses of object storage that cannot be used, once on each machine."""
    check_store(checkpoint_folder(config), "checkpoint.dir", writes=True)
    name = config.checkpoint.load
    if name is not None:
        check_store(place(name), "checkpoint.load", writes=False)


def _check_sinks(config: Config) -> None:
    """Refuse sinks that cannot work, where the rank that owns them starts."""
    for name in config.observe.sinks:
        load_plugin("sinks", "observe.sinks", name)
    project, variable = config.observe.wandb.project, config.observe.webhook_url_env
    if project is not None and not have_wandb():
        raise UnfitError(
            f"observe.wandb.project ({project!r}) must have the package wandb, which is not "
            f"installed; {how_to_install('wandb')}, or set it to null"
        )
    if variable is None:
        return
    from moepp_megatron.observe.alert_sinks import read_address

    try:
        read_address(variable)
    except ConfigError as error:
        raise ConfigError(f"observe.webhook_url_env ({variable}): {error}") from None
