"""Checks the tasks of `evaluation.tasks` before a run starts."""

from importlib.util import find_spec

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.runtime.optional import how_to_install


def check_tasks(config: Config) -> None:
    """Try each task without the model, to refuse those that cannot be evaluated.

    Raise UnfitError without lm-eval, and ConfigError for a task that is none or fails.
    """
    if not config.evaluation.tasks:
        return
    if find_spec("lm_eval") is None:
        raise UnfitError(
            f"evaluation.tasks ({', '.join(map(str, config.evaluation.tasks))}) must have the "
            "package lm-eval, which is not installed; "
            f"{how_to_install('lm-eval>=0.4.13,<0.5')}, or leave it out"
        )
    from moepp_megatron.data.prepared_data import tokenizer_of_run
    from moepp_megatron.data.tokenizer import Tokenizer
    from moepp_megatron.features.tasks.lm_eval_tasks import load_tasks, try_tasks

    tokenizer = Tokenizer.load(tokenizer_of_run(config))
    try_tasks(load_tasks(config), tokenizer, config.model.seq_length, config.evaluation.limit)
