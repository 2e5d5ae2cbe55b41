"""One MoE++ layer on test ranks and in reference.py: the same weights, tokens and loss."""

import numpy as np

from tests.parallel.training_runs import begin, join

SEQUENCE, BATCH = 16, 8
_LAYER = 1  # The second layer has a gating residual.
_PREFIX = f"decoder.layers.{_LAYER}.mlp."


def run_layers(settings):
    """`run_layer` for the settings of each name, all of one layout, which is built once."""
    from moepp_megatron.config import parse_config

    configs = {name: parse_config(raw) for name, raw in settings.items()}
    layout = join(next(iter(configs.values())))
    return {name: _run(config, layout) for name, config in configs.items()}


def run_layer(raw):
    """Forward and backward on this rank's tokens."""
    return _run(*begin(raw))


def _run(config, layout):
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from moepp_megatron.model.build import build_model

    (model,) = build_model(config)
    layer = model.decoder.layers[_LAYER].mlp
    where, x, previous, out_weight, logit_weight = _own_tensors(config, layout)
    x.requires_grad_()
    previous.requires_grad_()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    output, logits = layer(x, previous)
    ((output * out_weight).sum() + (logits * logit_weight).sum()).backward()
    return {
        "where": where,
        "output": output.detach().numpy(),
        "logits": logits.detach().numpy(),
        "input_grad": x.grad.numpy(),
        "previous_grad": previous.grad.numpy(),
        "pieces": _pieces(model),
    }


def evaluate_layer(raw):
    """The layer's output of this rank's tokens in evaluation, without autograd."""
    import torch

    from moepp_megatron.model.build import build_model

    config, layout = begin(raw)
    (model,) = build_model(config)
    model.eval()
    _, x, previous, *_ = _own_tensors(config, layout)
    layer = model.decoder.layers[_LAYER].mlp
    with torch.no_grad():
        arguments = (x,) if config.moe.is_vanilla else (x, previous)
        return layer(*arguments)[0].numpy()


def run_reference(raw, data_parallel_size):
    """The same on one process with reference.py; each data-parallel share is one micro-batch."""
    import torch

    from moepp_megatron.model.build import build_model
    from moepp_megatron.model.megatron_config import moepp_config
    from moepp_megatron.moe.reference import ReferenceMoEPP

    config, _ = begin(raw)
    (model,) = build_model(config)
    reference = ReferenceMoEPP(
        moepp_config(config), config.model.hidden_size, config.model.ffn_hidden_size
    )
    layer = model.decoder.layers[_LAYER].mlp
    with torch.no_grad():
        reference.gate_weights[0].copy_(layer.router.weight)
        reference.residual_weight.copy_(layer.router.residual_weight)
        for index, expert in enumerate(layer.experts.local_experts):
            reference.expert_in[index].copy_(expert.linear_fc1.weight)
            reference.expert_out[index].copy_(expert.linear_fc2.weight)
        reference.constants.copy_(layer.zero_computation.constants)
        reference.mixing_weight.copy_(layer.zero_computation.mixing_weight)

    x, previous, out_weight, logit_weight = _tensors(config)
    x.requires_grad_()
    previous.requires_grad_()
    output, logits = torch.empty_like(out_weight), torch.empty_like(logit_weight)
    loss = torch.zeros(())
    for rank in range(data_parallel_size):
        share = (slice(None), _share(BATCH, rank, data_parallel_size))
        result = reference(x[share].flatten(0, 1), previous[share].flatten(0, 1))
        output[share] = result.hidden_TD.detach().view(output[share].shape)
        logits[share] = result.logits_TE.detach().view(logits[share].shape)
        num_tokens = result.hidden_TD.shape[0]
        loss = loss + (result.hidden_TD * out_weight[share].flatten(0, 1)).sum()
        loss = loss + (result.logits_TE * logit_weight[share].flatten(0, 1)).sum()
        loss = loss + result.balance_loss * config.moe.balance_coeff * num_tokens
    loss.backward()
    return {
        "output": output.numpy(),
        "logits": logits.numpy(),
        "input_grad": x.grad.numpy(),
        "previous_grad": previous.grad.numpy(),
        "gradients": {
            _PREFIX + name: parameter.grad.numpy()
            for name, parameter in (
                ("router.weight", reference.gate_weights[0]),
                ("router.residual_weight", reference.residual_weight),
                ("experts.experts.linear_fc1.weight", reference.expert_in),
                ("experts.experts.linear_fc2.weight", reference.expert_out),
                ("zero_computation.constants", reference.constants),
                ("zero_computation.mixing_weight", reference.mixing_weight),
            )
        },
    }


def add_up(results):
    """The whole layer from its ranks: tokens side by side, parameter gradients added."""
    whole = {"gradients": {}}
    for name in ("output", "logits", "input_grad", "previous_grad"):
        width = results[0][name].shape[-1]
        whole[name] = np.full((SEQUENCE, BATCH, width), np.nan, dtype=np.float32)
        for result in results:
            whole[name][result["where"]] = result[name]
    for result in results:
        for key, shape, offset, values in result["pieces"]:
            gradient = whole["gradients"].setdefault(key, np.zeros(shape, dtype=np.float32))
            part = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            gradient[part] += values
    return whole


def _share(length, rank, size):
    return slice(rank * length // size, (rank + 1) * length // size)


def _tensors(config):
    """Input, previous logits, and the weights of the loss, all [s, b, .] over all ranks."""
    import torch

    generator = torch.Generator().manual_seed(3)
    widths = (config.model.hidden_size, config.moe.num_experts) * 2
    return [torch.randn(SEQUENCE, BATCH, width, generator=generator) for width in widths]


def _own_tensors(config, layout):
    """Return this rank's part of all tokens, and its part of each of `_tensors`."""
    import torch.distributed as dist

    place = layout.coordinates(dist.get_rank())
    where = (_share(SEQUENCE, place.tp, layout.tp), _share(BATCH, place.dp, layout.dp))
    return where, *(tensor[where].clone() for tensor in _tensors(config))


def _pieces(model):
    """(checkpoint name, global shape, global offset, gradient) of the layer's parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from moepp_megatron.model.initialize import _sharded_tensors

    for parameter in model.parameters():
        parameter.main_grad = parameter.grad
    from tests.parallel.training_runs import view_of_gradient

    pieces = []
    parameters = list(model.named_parameters())
    for entry in nested_values(model.sharded_state_dict()):
        for tensor in _sharded_tensors(entry):
            # The norm before the layer is stored under the layer's name, but is no part of it.
            if not tensor.key.startswith(_PREFIX) or "norm" in tensor.key:
                continue
            storage = tensor.data.untyped_storage().data_ptr()
            owners = [p for p in parameters if p[1].untyped_storage().data_ptr() == storage]
            gradient = view_of_gradient(tensor.data, owners)
            shape = [1] * tensor.prepend_axis_num + list(tensor.local_shape)
            values = gradient.reshape(shape).numpy().copy()
            pieces.append((tensor.key, tensor.global_shape, tensor.global_offset, values))
    return pieces
