"""Short training runs on test ranks, and what must be the same in every layout.

`train` runs on every rank. It uses the trainer's own parts (model, wrapping, batches, step,
statistics), so a comparison covers what a user runs. `compare` holds one run against another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Small, but with everything on: grouped-query attention, residual, all kinds of experts.
BASE: dict[str, dict[str, Any]] = {
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


@dataclass
class Run:
    """What a run did. Identical on every rank but for `gradients`.

    Attributes:
        losses: Language-model loss of each step.
        grad_norms: Gradient norm of each step.
        routing: Routing metrics of each step.
        gradients: Of the first step: checkpoint name to global gradient, assembled from all ranks.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)


def settings(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`BASE` with some settings changed, such as `settings(moe={"tau": 0.5})`."""
    merged = {name: dict(values) for name, values in BASE.items()}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return merged


def train(raw: dict[str, Any], steps: int) -> tuple[Run, list[Any]]:
    """Train on this rank's layout. Returns the run and this rank's pieces of the gradients."""
    import torch.distributed as dist

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.collect import RoutingCollector, mean_loss
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    config = parse_config(raw)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    collector = RoutingCollector(model, config, layout)
    pieces = _capture_gradients(model)
    batches = rank_batches(SyntheticDataset(config, steps), 0, config, len(model.chunks))
    run = Run()
    for _ in range(steps):
        collector.reset()
        result = training_step(model, batches, config, layout)
        run.losses.append(mean_loss(result.losses))
        run.grad_norms.append(result.grad_norm)
        run.routing.append(collector.collect())
    return run, pieces


def assemble(results: list[tuple[Run, list[Any]]]) -> Run:
    """One run from what every rank returned; fails where ranks disagree."""
    first = results[0][0]
    for rank, (run, _) in enumerate(results):
        assert run.losses == first.losses, f"rank {rank} logs other losses than rank 0"
        assert run.grad_norms == first.grad_norms, f"rank {rank} has another gradient norm"
    for _, pieces in results:
        for key, shape, offset, values in pieces:
            whole = first.gradients.setdefault(key, np.full(shape, np.nan, dtype=np.float32))
            where = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            whole[where] = values
    for key, whole in first.gradients.items():
        assert not np.isnan(whole).any(), f"no rank holds all of the gradient of {key}"
    return first


def compare(run: Run, reference: Run, relative: float) -> None:
    """Fail unless the run is the reference run up to `relative`.

    Gradients are compared by tensor, relative to the tensor's largest element.
    """
    np.testing.assert_allclose(run.losses, reference.losses, rtol=relative)
    # The norm adds up squares of all gradients, so its error is that of the largest of them.
    np.testing.assert_allclose(run.grad_norms, reference.grad_norms, rtol=10 * relative)
    assert run.gradients.keys() == reference.gradients.keys()
    for key, expected in reference.gradients.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            run.gradients[key], expected, rtol=0, atol=10 * relative * scale, err_msg=key
        )
    for step, (mine, theirs) in enumerate(zip(run.routing, reference.routing, strict=True)):
        for name in ("expert_share", "layer_expert_share", "ffn_fraction", "dropped_fraction"):
            np.testing.assert_allclose(
                mine[name], theirs[name], rtol=0, atol=1e-12, err_msg=f"{name} of step {step}"
            )
        np.testing.assert_allclose(mine["balance_loss"], theirs["balance_loss"], rtol=10 * relative)


class SyntheticDataset:
    """Sequences that depend on their index alone; some tokens are masked out of the loss."""

    def __init__(self, config: Any, steps: int) -> None:
        self._config = config
        self._length = steps * config.training.global_batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        model = self._config.model
        generator = torch.Generator().manual_seed(index)
        # Squared uniforms: a skewed distribution, which a model can learn.
        uniform = torch.rand(model.seq_length + 1, generator=generator)
        tokens = (uniform.square() * model.vocab_size).long()
        loss_mask = torch.ones(model.seq_length)
        # Uneven token counts, so that a mean of means would be another number.
        loss_mask[: index % 3] = 0.0
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": loss_mask,
            "position_ids": torch.arange(model.seq_length),
        }


def _capture_gradients(model: Any) -> list[Any]:
    """A list that fills with this rank's pieces of the first step's final gradients."""
    from megatron.core.distributed import finalize_model_grads

    pieces: list[Any] = []

    def finalize(chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        finalize_model_grads(chunks, num_tokens, **kwargs)
        if not pieces:
            for chunk, inner in zip(model.chunks, model.models, strict=True):
                _complete_shards(chunk)
                pieces.extend(_gradient_pieces(inner))

    model.chunks[0].config.finalize_model_grads_func = finalize
    return pieces


def _complete_shards(chunk: Any) -> None:
    """The distributed optimizer leaves each rank its shard of the gradients: gather the others."""
    import torch.distributed as dist

    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _gradient_pieces(model: Any) -> list[Any]:
    """(name, global shape, global offset, values) of every local parameter's gradient."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from moepp_megatron.model.initialize import sharded_tensors

    by_storage = {p.untyped_storage().data_ptr(): [] for p in model.parameters()}
    for name, parameter in model.named_parameters():
        by_storage[parameter.untyped_storage().data_ptr()].append((name, parameter))
    pieces = []
    for entry in nested_values(model.sharded_state_dict()):
        for tensor in sharded_tensors(entry):
            candidates = by_storage.get(tensor.data.untyped_storage().data_ptr(), [])
            gradient = view_of_gradient(tensor.data, candidates)
            if gradient is not None:
                shape = tensor.global_shape
                values = gradient.reshape(
                    [1] * tensor.prepend_axis_num + list(tensor.local_shape)
                ).float()
                pieces.append((tensor.key, shape, tensor.global_offset, values.numpy().copy()))
    return pieces


def view_of_gradient(data: Any, candidates: list[Any]) -> Any:
    """The part of a parameter's gradient that `data` is of the parameter, or None."""
    for _, parameter in candidates:
        start = data.storage_offset() - parameter.storage_offset()
        if 0 <= start < parameter.numel():
            gradient = parameter.main_grad.reshape(-1)
            return gradient[start : start + data.numel()].view(data.shape)
    return None
