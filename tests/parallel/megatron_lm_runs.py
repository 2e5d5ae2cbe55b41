"""Runs of Megatron-LM's own loop, `megatron.training.pretrain`, on test ranks.

The loop is entered as a user enters it: with the command line in `sys.argv`, the forward pass of
launch/pretrain_megatron_lm.py, and nothing of the package's trainer. Initial weights and data are
those of `training_runs.train`, so the two can be compared. What the loop logs is read back from
its TensorBoard files.
"""

import contextlib
import os
import shlex
import sys
from types import SimpleNamespace

from tests.parallel.training_runs import (
    Run,
    SyntheticDataset,
    complete_shards,
    gradient_pieces,
    settings,
)

STEPS = 2
# Megatron's schedule counts steps from 0 where ours counts from 1; a constant rate has no such
# difference.
SETTINGS = settings(
    optimizer={"decay_style": "constant", "warmup_iters": 0}, training={"global_batch_size": 4}
)
CPU_ARGUMENTS = (
    "--distributed-backend gloo --transformer-impl local --use-cpu-initialization "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion "
    "--no-rope-fusion --no-persist-layer-norm --num-workers 0"
)
# `SETTINGS` in Megatron's words: the model, and how it is trained.
MODEL_ARGUMENTS = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2 "
    "--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.01"
)
RUN_ARGUMENTS = (
    "--moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant "
    "--weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1 --use-distributed-optimizer "
    "--calculate-per-token-loss --tokenizer-type NullTokenizer --vocab-size 64 "
    "--make-vocab-size-divisible-by 1 --eval-iters 0 --eval-interval 100 --log-interval 1 "
    f"--tensorboard-log-interval 1 --train-iters {STEPS} {CPU_ARGUMENTS}"
)
ARGUMENTS = f"{MODEL_ARGUMENTS} {RUN_ARGUMENTS}"


def command_line(arguments, log):
    """Give this rank the command line of a run that logs to `log`."""
    # Megatron asks for it with tensor or context parallelism before it looks for a GPU.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    words = shlex.split(arguments)
    sys.argv = ["pretrain_megatron_lm.py", *words, "--tensorboard-dir", log]


def scalars(log):
    """Return the scalars of Megatron's log by name, one a step. Every rank must call it."""
    import torch.distributed as dist
    from megatron.training import get_tensorboard_writer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = get_tensorboard_writer()
    if writer:
        writer.flush()
    dist.barrier()
    events = EventAccumulator(log)
    events.Reload()
    return {
        name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def train_in_megatron_lm(arguments, way, log):
    """Returns what `training_runs.train` returns; the model gets in by config, spec or provider."""
    from launch import pretrain_megatron_lm

    command_line(f"{ARGUMENTS} {arguments}", log)
    observer = Observer(_config(arguments))
    try:
        _pretrain(pretrain_megatron_lm, way, observer)
        logged = scalars(log)
    finally:
        _forget()
    run = Run(logged["lm loss"], logged["grad-norm"], observer.routing)
    assert len(run.losses) == STEPS, f"{len(run.losses)} steps are logged"
    for mine, theirs in zip(observer.routing, logged["load_balancing_loss"], strict=True):
        # TensorBoard keeps fp32.
        assert abs(float(mine["balance_loss"]) - theirs) <= 1e-6 * theirs, "the log is wrong"
    return run, observer.pieces


def scores_in_megatron_lm(arguments, log, input_ids, way="config"):
    """Log-probabilities [b, s - 1] of each token after the first, by the model at the end."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from launch import pretrain_megatron_lm

    command_line(arguments, log)
    observer = Observer(_config(arguments))
    try:
        with child_processes():
            _pretrain(pretrain_megatron_lm, way, observer)
        (model,) = observer.models
        model.eval()
        tokens = torch.from_numpy(input_ids)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        with torch.no_grad():
            parallel = model(tokens, positions, None).float()[:, :-1]
        logits = gather_from_tensor_model_parallel_region(parallel)
        scores = logits.log_softmax(dim=-1)
        return scores.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2).numpy()
    finally:
        _forget()


@contextlib.contextmanager
def child_processes():
    """Let this test rank, a daemon, start processes; the writer's queue has one, ended here."""
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = config.get("daemon")
    config["daemon"] = False
    queue_before, filesystem_async._results_queue = filesystem_async._results_queue, None
    try:
        yield
    finally:
        config["daemon"] = before
        queue = filesystem_async._results_queue
        filesystem_async._results_queue = queue_before
        if queue is not None:
            queue._manager.shutdown()


def _pretrain(script, way, observer):
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from moepp_megatron.interop import megatron_lm

    # Megatron-LM's own pretrain_gpt.py knows no argument of ours.
    extra = None if way == "spec" else megatron_lm.add_moepp_arguments
    args = parse_and_validate_args(extra_args_provider=extra)
    script.spare_the_dataset_compiler()
    model_config, provider = None, None
    if way == "provider":

        def provider(*inputs, **named):
            model = megatron_lm.model_provider(*inputs, **named)
            observer.built([model])
            return model

    else:
        kind = {} if way == "spec" else {"model_config_cls": megatron_lm.MoEPPModelConfig}
        model_config = gpt_config_from_args(args, **kind)
        model_config.pre_wrap_hooks.append(observer.built)

    def datasets(num_samples, vp_stage=None):
        return SyntheticDataset(observer.config, STEPS), None, None

    datasets.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets,
        ModelType.encoder_or_decoder,
        script.forward_step,
        model_provider=provider,
    )


class Observer:
    """Sets the weights of a run in a loop of others, and sees its gradients and routing."""

    def __init__(self, config):
        self.models = []
        self.routing = []
        self.pieces = []
        self.config = config

    def built(self, models):
        from moepp_megatron.model.initialize import initialize_weights

        initialize_weights(models, self.config.training.seed)
        self.models += models
        # The loop sets its own function where there is none.
        models[0].config.finalize_model_grads_func = self.finalize
        return models

    def finalize(self, chunks, num_tokens=None, **kwargs):
        import torch.distributed as dist
        from megatron.core.distributed import finalize_model_grads

        from moepp_megatron.config import Layout
        from moepp_megatron.moe.layer import moe_statistics
        from moepp_megatron.training.parts.routing_counts import RoutingCountsPart

        finalize_model_grads(chunks, num_tokens, **kwargs)
        if not self.pieces:
            for chunk, model in zip(chunks, self.models, strict=True):
                complete_shards(chunk)
                self.pieces.extend(gradient_pieces(model))
        layout = Layout.from_config(self.config, dist.get_world_size())
        model = SimpleNamespace(models=self.models)
        self.routing.append(RoutingCountsPart(model, self.config, layout).collect())  # type: ignore[arg-type]
        for chunk in self.models:
            for statistics in moe_statistics(chunk).values():
                statistics.reset()


def _config(arguments):
    from moepp_megatron.config import parse_config

    return parse_config(settings(**{**SETTINGS, "parallel": _parallel(arguments)}))


def _parallel(arguments):
    """The layout among Megatron's arguments, in ours."""
    words = arguments.split()
    layout = {"sequence_parallel": "--sequence-parallel" in words}
    for name in ("tensor", "pipeline", "expert"):
        option = f"--{name}-model-parallel-size"
        if option in words:
            layout[f"{name}_model_parallel_size"] = int(words[words.index(option) + 1])
    if "--context-parallel-size" in words:
        layout["context_parallel_size"] = int(words[words.index("--context-parallel-size") + 1])
    return layout


def run_script(arguments, log):
    """Return the log of launch/pretrain_megatron_lm.py, run as it is."""
    from launch import pretrain_megatron_lm

    command_line(arguments, log)
    try:
        pretrain_megatron_lm.main()
        return scalars(log)
    finally:
        _forget()


def _forget():
    """Empty Megatron's globals, for the next run in this process."""
    from megatron.training import global_vars

    global_vars.unset_global_variables()
    global_vars.destroy_global_vars()
