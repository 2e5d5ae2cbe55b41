"""Checks of a run's paths: data, checkpoint, teacher, a folder that can be written."""

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.paths import is_address


def path_problems(config: Config) -> tuple[list[str], list[str]]:
    """A line for each path that a run would refuse on this machine, and the data's warnings.

    Nothing is made or changed, and object storage is not asked.
    """
    from moepp_megatron.data.prepared_data import check_data
    from moepp_megatron.features.registry import FILE_CHECKS, named
    from moepp_megatron.training.checkpoint.find import check_start
    from moepp_megatron.training.run_folder import RunFolder, checkpoint_folder

    def check_folder(config: Config) -> None:
        RunFolder(config).refuse_unwritable()

    def check_checkpoint(config: Config) -> None:
        folder, load = checkpoint_folder(config), config.checkpoint.load
        if load is not None and not is_address(str(folder if load == "auto" else load)):
            check_start(config, folder)

    def check_data_folders(config: Config) -> None:
        warnings.extend(check_data(config, whole_index=False))

    problems: list[str] = []
    warnings: list[str] = []
    for check in (check_folder, check_data_folders, check_checkpoint, *named(FILE_CHECKS)):
        try:
            check(config)
        except ConfigError as error:
            problems += str(error).splitlines()
    return problems, warnings
