"""Short training runs on test ranks, and what must be the same in every layout.

`train` runs on every rank. It uses the trainer's own parts (model, wrapping, batches, step,
statistics), so a comparison covers what a user runs. `compare` holds one run against another.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# Small, but with everything on: grouped-query attention, residual, all kinds of experts.
BASE = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "seq_length": 16,
        "vocab_size": 64,
        # Larger than usual: routing decides by clear margins, not by the last bit.
        "init_method_std": 0.2,
    },
    "moe": {"num_ffn_experts": 8},
    "optimizer": {"lr": 1.0e-3, "weight_decay": 0.1, "warmup_iters": 2},
    "training": {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7},
}
# Steps of a `short` run.
STEPS = 2

# What layouts are made of, layers that are all computed again, and the vanilla MoE layer.
EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LATENT_WIDTHS = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
LATENT = {
    "num_query_groups": None,
    "qk_layernorm": True,
    "latent_attention": LATENT_WIDTHS,
}
VANILLA = {
    "num_zero_experts": 0,
    "num_copy_experts": 0,
    "num_constant_experts": 0,
    "gating_residual": False,
}


@dataclass
class Run:
    """The course of a run."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    divergences: list[float] = field(default_factory=list)
    mtp_losses: list[float] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)


def settings(**sections):
    """`BASE` with some settings changed, such as `settings(moe={"tau": 0.5})`."""
    return merged(BASE, sections)


def merged(base, sections):
    """Sections of a configuration, with some settings changed."""
    return {n: base.get(n, {}) | sections.get(n, {}) for n in base | sections}


def short(**sections):
    """As `settings`, for two steps of two layers and two micro-batches of two sequences."""
    small = {
        "model": {"num_layers": 2},
        "optimizer": {"warmup_iters": 0},
        "training": {"global_batch_size": 4},
    }
    return settings(**merged(small, sections))


def join(config):
    """The layout of a configuration on the ranks that call; its process groups are there."""
    import torch.distributed as dist

    from moepp_megatron.config import Layout
    from moepp_megatron.runtime.distributed import build_groups

    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    return layout


def begin(raw):
    """Configuration and layout on this rank."""
    from moepp_megatron.config import parse_config

    config = parse_config(raw)
    return config, join(config)


def begin_training(raw):
    """Configuration, layout and a model in training on this rank."""
    from moepp_megatron.training.setup import build_training_model

    config, layout = begin(raw)
    model = build_training_model(config)
    model.set_training(True)
    return config, layout, model


def losses_and_gradients(raw, inputs):
    """On one rank, with weights of a seed: `losses`, and the gradients of their sum.

    `inputs(config)` gives the model's inputs by name, and which [b, s] of the losses count.
    """
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from moepp_megatron.model.build import build_model
    from moepp_megatron.model.initialize import initialize_weights

    config, _ = begin(raw)
    (model,) = build_model(config)
    initialize_weights([model], seed=3)
    model.train()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    batch, counted = inputs(config)
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    losses = model(position_ids=positions, **batch)[counted]
    losses.sum().backward()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    values = {name: each.grad for name, each in model.named_parameters()}
    values["losses"] = losses.detach()
    return {name: value.numpy().copy() for name, value in values.items()}


def train(raw, steps, prepare=None):
    """Train on this rank's layout."""
    from megatron.core.distributed import finalize_model_grads

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.checkpoint.files import Progress
    from moepp_megatron.training.part import Parts, Step
    from moepp_megatron.training.parts.order import _part_kinds
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout = begin(raw)
    model = build_training_model(config)
    # By name, so that a feature can be deleted without these runs.
    names = ("DistillationPart", "MultiTokenPredictionPart", "RoutesPart", "StaticRowsPart")
    of_loss = [kind for kind in _part_kinds() if kind.__name__ in names]
    dataset = SyntheticDataset(config, steps)
    losses = _made(of_loss, config, layout, model, dataset).parts
    if prepare is not None:
        prepare(model.models)
        model.optimizer.reload_model_params()
    model.set_training(True)
    collector = RoutingCountsPart(model, config, layout)
    parts = Parts([collector, *losses])
    pieces = _capture_gradients(model)
    batches = rank_batches(dataset, 0, config, len(model.chunks))
    run = Run()
    recorded = {
        "distillation_loss": run.divergences,
        "mtp_loss": run.mtp_losses,
        "static_fill": run.fills,
        "repeated_steps": run.repeated,
    }
    for step in range(1, steps + 1):
        parts.begin_step(step, layout)
        begin_again = partial(parts.begin_step, step, layout)
        result = training_step(model, batches, config, layout, parts, begin_again=begin_again)
        if step == 1:
            model.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        run.losses.append(mean_loss(result.losses))
        run.grad_norms.append(result.grad_norm)
        run.routing.append(collector.collect())
        progress = Progress(step=step)
        for part in losses:
            part.end_step(Step(progress, 0, config.training.global_batch_size, 0.0, result))
            for name, value in part.record(None, {}).items():
                recorded[name].append(value)
    return run, pieces


def _made(kinds, config, layout, model, dataset):
    """Return the trainer's builders of parts, with those of some kinds."""
    from moepp_megatron.training.checkpoint.files import Progress
    from moepp_megatron.training.part import PartContext, Parts
    from moepp_megatron.training.parts.order import build_parts

    nobody = None
    run = PartContext(
        config=config,
        layout=layout,
        model=model,
        supervisor=nobody,
        tokenizer=Path(),
        train_set=dataset,
        valid_set=None,
        valid_sets={},
        progress=Progress(),
    )
    Parts(build_parts(run, kinds)).load({}, "resume", 0)
    return run


def watching(see, *summands):
    """Hooks of a step that only look at each micro-batch, and join its read."""
    from moepp_megatron.training.step import StepHooks

    class Watching(StepHooks):
        def see(self, *args):
            see(*args)

        def summands(self):
            return summands

    return [Watching()]


def counting_parts(config, layout, model, dataset, *more, guarded=False):
    """The parts that count and watch routers, as the trainer makes them, and others."""
    from moepp_megatron.training.part import Parts
    from moepp_megatron.training.parts.order import _part_kinds
    from moepp_megatron.training.parts.refused_batches import RefusedBatchesPart
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart

    kinds = list(_part_kinds())
    counting = kinds[kinds.index(RoutingCountsPart) : kinds.index(RefusedBatchesPart)]
    run = _made(counting, config, layout, model, dataset)
    if guarded:
        run.parts.append(RefusedBatchesPart(run))
    return Parts([*run.parts, *more])


def part_of(trainer, kind):
    """The trainer's part of a kind."""
    return next(part for part in trainer.parts if isinstance(part, kind))


def with_first_part(trainer, part):
    """Give the trainer a part that comes before all others."""
    from moepp_megatron.training.part import Parts

    trainer.parts = Parts([part, *trainer.parts])


def assemble(results):
    """One run from what every rank returned; fails where ranks disagree."""
    first = results[0][0]
    for rank, (run, _) in enumerate(results):
        assert run.losses == first.losses, f"rank {rank} logs other losses than rank 0"
        assert run.grad_norms == first.grad_norms, f"rank {rank} has another gradient norm"
        assert run.mtp_losses == first.mtp_losses, f"rank {rank}, other mtp_losses"
    for _, pieces in results:
        for key, shape, offset, values in pieces:
            whole = first.gradients.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            whole[where] = values
    for key, whole in first.gradients.items():
        assert not np.isnan(whole).any(), f"no rank holds all of the gradient of {key}"
    return first


@dataclass(frozen=True)
class Difference:
    """The differences between two runs."""

    loss: float
    grad_norm: float
    gradient: float
    parameter: str
    all_gradients: float
    balance_loss: float
    selections: float


def difference(run, reference):
    """Compare a run with the reference run, step by step and gradient by gradient."""
    assert run.gradients.keys() == reference.gradients.keys(), "other parameters have gradients"
    gradients = {
        name: _relative_to_largest(run.gradients[name], expected)
        for name, expected in reference.gradients.items()
    }
    parameter = max(gradients, key=gradients.__getitem__)
    steps = list(zip(run.routing, reference.routing, strict=True))
    losses = [name for name in ("balance_loss", "z_loss") if name in reference.routing[0]]
    return Difference(
        loss=_relative(run.losses + run.mtp_losses, reference.losses + reference.mtp_losses),
        grad_norm=_relative(run.grad_norms, reference.grad_norms),
        gradient=gradients[parameter],
        parameter=parameter,
        all_gradients=_l2(run.gradients[name] - g for name, g in reference.gradients.items())
        / _l2(reference.gradients.values()),
        balance_loss=max(
            _relative([mine[name]], [theirs[name]]) for mine, theirs in steps for name in losses
        ),
        selections=max(
            float(np.abs(np.subtract(mine[name], theirs[name])).max())
            for mine, theirs in steps
            for name in ("layer_expert_share", "layer_ffn_fraction", "dropped_fraction")
        ),
    )


def compare(run, reference, relative):
    """Fail unless every number of the run is that of the reference run up to `relative`."""
    found = difference(run, reference)
    largest = max(found.loss, found.grad_norm, found.gradient, found.balance_loss)
    assert largest <= relative, found
    assert found.selections < 1e-12, found
    return found


def _l2(arrays):
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def _relative(values, expected):
    """Largest difference, relative to what is expected; 0 where both are 0."""
    wanted = np.abs(np.asarray(expected))
    apart = np.abs(np.subtract(values, expected))
    assert not np.isnan(apart).any(), f"not a number: {values}, expected {expected}"
    unwanted = np.where(apart > 0, np.inf, 0.0)
    return float(np.divide(apart, wanted, out=unwanted, where=wanted > 0).max())


def _relative_to_largest(values, expected):
    """As `_relative`, but to the largest expected element."""
    largest = float(np.abs(expected).max())
    return _relative([float(np.abs(values - expected).max()) + largest], [largest])


class SyntheticDataset:
    """Sequences that depend only on their index; some tokens are masked out of the loss."""

    def __init__(self, config, steps):
        self._config = config
        self._length = steps * config.training.global_batch_size

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        import torch

        model = self._config.model
        generator = torch.Generator().manual_seed(index)
        # Squared uniforms: a skewed distribution, which a model can learn.
        uniform = torch.rand(model.seq_length + 1, generator=generator)
        tokens = (uniform.square() * model.vocab_size).long()
        loss_mask = torch.ones(model.seq_length)
        # Uneven token counts, so that a mean of means would be another number.
        loss_mask[: index % 3] = 0.0
        sample = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": loss_mask,
            "position_ids": torch.arange(model.seq_length),
        }
        if self._config.data.reset_attention_mask:
            place = torch.arange(model.seq_length)
            padded = place >= model.seq_length - index % 7
            sample |= {
                "documents": (place >= 3 + index % 5).long() + (place >= 9) + padded,
                "padding_mask": padded,
                "loss_mask": ((tokens[1:] % 3 < index % 3) & ~padded).float(),
            }
        return sample


def _capture_gradients(model):
    """A list with this rank's pieces of the newest pass's final gradients."""
    from megatron.core.distributed import finalize_model_grads

    pieces = []

    def finalize(chunks, num_tokens=None, **kwargs):
        finalize_model_grads(chunks, num_tokens, **kwargs)
        # A step's passes may run again.
        pieces.clear()
        for chunk, inner in zip(model.chunks, model.models, strict=True):
            complete_shards(chunk)
            pieces.extend(gradient_pieces(inner))

    model.chunks[0].config.finalize_model_grads_func = finalize
    return pieces


def complete_shards(chunk):
    """The distributed optimizer leaves each rank its shard of the gradients: gather the others."""
    import torch.distributed as dist

    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def gradient_pieces(model):
    """(name, global shape, global offset, values) of every local parameter's gradient."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from moepp_megatron.model.initialize import _sharded_tensors

    by_storage = {p.untyped_storage().data_ptr(): [] for p in model.parameters()}
    for name, parameter in model.named_parameters():
        by_storage[parameter.untyped_storage().data_ptr()].append((name, parameter))
    pieces = []
    for entry in nested_values(model.sharded_state_dict()):
        for tensor in _sharded_tensors(entry):
            candidates = by_storage.get(tensor.data.untyped_storage().data_ptr(), [])
            gradient = view_of_gradient(tensor.data, candidates)
            if gradient is not None:
                shape = tensor.global_shape
                values = gradient.reshape(
                    [1] * tensor.prepend_axis_num + list(tensor.local_shape)
                ).float()
                pieces.append(
                    (tensor.key, shape, tensor.global_offset, values.cpu().numpy().copy())
                )
    return pieces


def view_of_gradient(data, candidates):
    """The part of a parameter's gradient that `data` is of the parameter, or None."""
    for _, parameter in candidates:
        start = data.storage_offset() - parameter.storage_offset()
        if 0 <= start < parameter.numel():
            gradient = parameter.main_grad.reshape(-1)
            return gradient[start : start + data.numel()].view(data.shape)
    return None
