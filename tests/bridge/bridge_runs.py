"""Functions of ranks in tests with Megatron-Bridge; nothing of the package's trainer is used."""

from dataclasses import fields
from functools import partial

from tests.parallel.megatron_lm_runs import Observer, child_processes
from tests.parallel.training_runs import Run, SyntheticDataset, begin


def train_in_bridge(raw, steps, way):
    """Returns what `training_runs.train` returns, of a model that Bridge builds and wraps."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import (
        OptimizerConfig,
        get_megatron_optimizer,
        get_standard_config_overrides,
    )
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.step_sums import mean_loss

    config, layout = begin(raw)
    provider = _provider(config, way)
    provider.calculate_per_token_loss = True
    provider.finalize()
    observer = Observer(config)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    chunks = provider.provide_distributed_model(
        ddp_config=ddp, use_cpu_initialization=True, pre_wrap_hook=observer.built
    )
    rates = config.optimizer
    settings = OptimizerConfig(
        lr=rates.lr,
        weight_decay=rates.weight_decay,
        adam_beta2=rates.adam_beta2,
        clip_grad=rates.clip_grad,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(
        settings, chunks, get_standard_config_overrides(settings), use_gloo_process_groups=False
    )
    # It is what leaves vectors without weight decay.
    constant = dict.fromkeys(("init_lr", "max_lr", "min_lr"), rates.lr)
    constant |= dict.fromkeys(("start_wd", "end_wd"), rates.weight_decay)
    styles = {"lr_decay_style": "constant", "wd_incr_style": "constant"}
    OptimizerParamScheduler(
        optimizer,
        lr_warmup_steps=0,
        lr_decay_steps=steps,
        wd_incr_steps=steps,
        **constant,
        **styles,
    )
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    batches = rank_batches(SyntheticDataset(config, steps), 0, config, len(chunks))
    run = Run(routing=observer.routing)
    for _ in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reported = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches if len(chunks) > 1 else batches[0],
            model=chunks,
            num_microbatches=layout.num_microbatches,
            seq_length=config.model.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=False,
        )
        run.grad_norms.append(optimizer.step()[1])
        run.losses.append(mean_loss(_sum([part["losses"] for part in reported])))
    return run, observer.pieces


def _provider(config, way):
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    from moepp_megatron.interop.bridge import MoEPPModelProvider, moepp_layer_spec

    provider = MoEPPModelProvider.from_config(config)
    if way == "provider":
        return provider
    # A provider of Bridge's own with the same fields, and our layers.
    same = {f.name: getattr(provider, f.name) for f in fields(GPTModelProvider) if f.init}
    spec = partial(moepp_layer_spec, moepp=provider.moepp)
    return GPTModelProvider(**same | {"transformer_layer_spec": spec})


def _forward_step(batches, model):
    batch = next(batches)
    mask = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_token_loss, mask=mask)


def _token_loss(losses, mask):
    import torch

    total, count = (losses.float() * mask).sum(), mask.sum().int()
    return total, count, {"losses": torch.stack([total.detach().double(), count.double()])}


def _sum(losses):
    """[2] sum and count; stages before the last have none."""
    import torch

    return sum(losses, torch.zeros(2, dtype=torch.float64))


def pretrain_in_bridge(raw, steps, save, source, target, begin_at=0):
    """Bridge's own loop, `pretrain`, which saves every second step, from a start or a checkpoint.

    The model at the end is written to `target` as the Hugging Face folder `source` is.
    """
    import sys
    from unittest import mock

    import torch

    # For other data and other ways to restart, which this run does not have.
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess", "megatron.energon"):
        sys.modules.setdefault(name, mock.MagicMock())
    from megatron.bridge import AutoBridge
    from megatron.bridge.data.base import DatasetProvider
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training import initialize, setup
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    import moepp_megatron.interop.bridge  # noqa: F401
    from moepp_megatron.config import parse_config
    from moepp_megatron.model.initialize import initialize_weights

    config = parse_config(raw)
    provider, observer, run = _provider(config, "provider"), Observer(config), Run()
    provider.calculate_per_token_loss = True
    provider.use_cpu_initialization = True

    def as_ours(models):
        initialize_weights(models, config.training.seed)
        observer.models += models
        return models

    provider.register_pre_wrap_hook(as_ours)

    class Synthetic(DatasetProvider):
        def build_datasets(self, context):
            return SyntheticDataset(config, steps), None, None

    class Reader(Callback):
        def on_train_step_end(self, context):
            # Only the last stage has it.
            loss = torch.as_tensor(context.loss_dict.get("lm loss", 0.0)).float().clone().view(1)
            torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.MAX)
            run.losses.append(loss.item())
            run.grad_norms.append(float(context.grad_norm))

        def on_train_end(self, context):
            # Behind it, the loop ends its process groups.
            written = AutoBridge.from_hf_pretrained(source)
            written.save_hf_pretrained(observer.models, target, show_progress=False)

    rates, sizes = config.optimizer, config.training
    container = bridge.ConfigContainer(
        train=bridge.TrainingConfig(
            train_iters=steps,
            global_batch_size=sizes.global_batch_size,
            micro_batch_size=sizes.micro_batch_size,
        ),
        validation=bridge.ValidationConfig(eval_interval=100, eval_iters=0),
        model=provider,
        optimizer=bridge.OptimizerConfig(
            lr=rates.lr,
            min_lr=rates.lr,
            weight_decay=rates.weight_decay,
            adam_beta2=rates.adam_beta2,
            clip_grad=rates.clip_grad,
            use_distributed_optimizer=True,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=rates.weight_decay,
            end_weight_decay=rates.weight_decay,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True
        ),
        dataset=Synthetic(dataloader_type="single", num_workers=0),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=config.model.vocab_size
        ),
        checkpoint=bridge.CheckpointConfig(
            save=str(save),
            load=str(save) if begin_at else None,
            ckpt_step=begin_at or None,
            save_interval=2,
        ),
        rng=bridge.RNGConfig(seed=sizes.seed),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
    )
    # The wheel of megatron-core has the compiled helpers, and no Makefile to compile them by.
    start = partial(initialize.initialize_megatron, allow_no_cuda=True)
    with (
        mock.patch.object(initialize, "compile_helpers"),
        mock.patch.object(setup, "initialize_megatron", start),
        mock.patch.object(setup, "finalize_model_grads", observer.finalize),
        child_processes(),
    ):
        pretrain(container, forward_step, [Reader()])
    run.routing = observer.routing
    return run, observer.pieces


def through_bridge(source, target, layout, ids):
    """Read a folder into a model of this layout, and write it back.

    Logits where there is a whole, else this rank's embeddings.

    Every rank must call.
    """
    import torch
    from megatron.bridge import AutoBridge

    import moepp_megatron.interop.bridge  # noqa: F401

    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    for name, value in layout.items():
        setattr(provider, name, value)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_hf_pretrained([model], target, show_progress=False)
    if layout:
        named = model.named_parameters()
        return [v.detach().numpy() for n, v in named if n.endswith("word_embeddings.weight")]
    with torch.no_grad():
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        return model.eval()(torch.from_numpy(ids), positions, None).float().numpy()


def run_config(raw):
    """Return what a stage exchanges, and its configuration as Bridge's `run_config.yaml` has it."""
    import yaml
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.instantiate_utils import instantiate
    from megatron.training.config.yaml_utils import safe_yaml_representers

    config, _ = begin(raw)
    provider = _provider(config, "provider")
    provider.moe_router_load_balancing_type = "none"
    provider.finalize()
    (stage,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    with safe_yaml_representers():
        text = yaml.safe_dump(_ConfigContainerBase._convert_value_to_dict(stage.config))
    again = instantiate(yaml.safe_load(text))
    return {
        "exchanged": stage.config.hidden_size,
        "hidden_size": again.hidden_size,
        "is the same layer": again.moepp == provider.moepp,
        "balance_coeff": stage.moepp.balance_coeff,
    }
