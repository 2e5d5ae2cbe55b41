"""A MoE++ layer on expert-parallel ranks whose collectives are watched."""

import contextlib

HIDDEN = 32


def routing_map(rank, num_tokens, num_ffn, num_experts, topk):
    """[T, E] bool random selections of a rank's tokens, another draw for every rank."""
    import torch

    generator = torch.Generator().manual_seed(100 + rank)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    # Some tokens without FFN expert and, on odd ranks, many.
    scores[:: 2 if rank % 2 else 5, :num_ffn] -= 1.0
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(topk).indices, True)


def balanced_map(rank, num_tokens, num_ffn, num_experts, topk):
    """[T, E] bool: every FFN expert is selected by as many tokens; all FFN shares are 3/4."""
    import torch

    selected = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    for token in range(num_tokens):
        block, place = divmod(token, num_ffn)
        for k in range(topk):
            is_ffn = block % 4 < 3
            selected[token, (place + k) % num_ffn if is_ffn else num_ffn + k] = True
    return selected


def build(raw):
    """The second MoE++ layer of a model, and its configuration; groups are built where none are."""
    from megatron.core import parallel_state

    from moepp_megatron.config import parse_config
    from moepp_megatron.model.build import build_model
    from tests.parallel.training_runs import join

    config = parse_config(raw)
    if not parallel_state.model_parallel_is_initialized():
        join(config)
    (model,) = build_model(config)
    return model.decoder.layers[1].mlp, config


def force(layer, selected):
    """Make the layer's router select what the [T, E] map says, with softmax gates."""
    import torch

    def finish(chosen, *_):
        scores = torch.softmax(chosen.logits.view(selected.shape), dim=-1)
        return chosen._replace(gates=scores * selected, routing_map=selected)

    layer.router.finish = finish


@contextlib.contextmanager
def watched_all_to_all(seen):
    """Call `seen(work, output, input, send)` for each all-to-all; what it returns is the work."""
    import torch.distributed as dist

    original = dist.all_to_all_single

    def watched(output, input, output_split_sizes, input_split_sizes, **kwargs):
        work = original(output, input, output_split_sizes, input_split_sizes, **kwargs)
        return seen(work, output, input, input_split_sizes)

    dist.all_to_all_single = watched
    try:
        yield
    finally:
        dist.all_to_all_single = original


def sent_bytes_of(settings, draw, num_tokens):
    """`sent_bytes` of the settings of each name, all of one layout."""
    return {name: sent_bytes(raw, draw, num_tokens) for name, raw in settings.items()}


def sent_bytes(raw, draw, num_tokens):
    """Forward and backward of a layer; what it handed to all-to-alls for other ranks."""
    import torch
    import torch.distributed as dist

    layer, config = build(raw)
    moe, rank = config.moe, dist.get_rank()
    selected = draw(rank, num_tokens, moe.num_ffn_experts, moe.num_experts, moe.router_topk)
    force(layer, selected)
    bytes_of = {"vectors": [0, 0], "metadata": [0, 0]}
    direction = 0

    def count(work, output, input, send):
        rows = sum(send) - send[rank]
        kind = "vectors" if input.shape[1:] == (HIDDEN,) else "metadata"
        row = input[:0].new_empty((1, *input.shape[1:]))
        bytes_of[kind][direction] += rows * row.numel() * row.element_size()
        return work

    dtype = next(layer.experts.parameters()).dtype
    hidden = torch.randn(num_tokens, 1, HIDDEN, dtype=dtype, requires_grad=True)
    with watched_all_to_all(count):
        output, _ = layer(hidden, torch.randn(num_tokens, 1, moe.num_experts))
        direction = 1
        output.float().sum().backward()
    return bytes_of | {
        "counted": layer.statistics.a2a_bytes,
        "map": selected[:, : moe.num_ffn_experts].numpy(),
    }


def events(raw):
    """Return what a layer with a shared expert starts, computes and waits for, in order."""
    import torch
    import torch.distributed as dist

    layer, config = build(raw)
    moe = config.moe
    num_tokens = 16
    force(layer, routing_map(dist.get_rank(), num_tokens, 8, moe.num_experts, moe.router_topk))
    log = []

    class Watched:
        def __init__(self, work, what):
            self._work, self._what = work, what

        def wait(self):
            log.append(f"wait {self._what}")
            self._work.wait()

    def watch(work, output, input, send):
        what = "vectors" if input.shape[1:] == (HIDDEN,) else "metadata"
        log.append(f"start {what}")
        return Watched(work, what)

    parts = {
        "shared expert": (layer.shared_experts, layer.shared_experts.linear_fc2.weight),
        "experts": (layer.experts, layer.experts.local_experts[0].linear_fc2.weight),
        "zero-computation experts": (layer.zero_computation, layer.zero_computation.constants),
    }
    for name, (module, weight) in parts.items():
        module.register_forward_hook(lambda *_, name=name: log.append(name))
        weight.register_hook(lambda _, name=name: log.append(name))
    hidden = torch.randn(num_tokens, 1, HIDDEN, requires_grad=True)
    with watched_all_to_all(watch), _watched_combine(layer, log):
        output, _ = layer(hidden, torch.randn(num_tokens, 1, moe.num_experts))
        log.append("backward")
        output.sum().backward()
    return log


@contextlib.contextmanager
def _watched_combine(layer, log):
    """Note where a kernel combines, if it does, and whether zero-computation experts are in it."""
    if not layer.fuses_rows:
        yield
        return
    from moepp_megatron.moe.kernels import combine

    original = combine.combine

    def watched(rows, table, zero, *others):
        log.extend(["zero-computation experts"] if zero is not None else [])
        log.extend(["combine"] if len(rows) else [])
        return original(rows, table, zero, *others)

    combine.combine = watched
    try:
        yield
    finally:
        combine.combine = original


def padded_to_capacity(dispatcher):
    """megatron-core's own MoE layer whose experts' batches are padded to a capacity."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_layer
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from moepp_megatron.model.megatron_config import transformer_config
    from moepp_megatron.moe.dispatcher import FFNAlltoAllTokenDispatcher
    from moepp_megatron.moe.spec import get_gpt_layer_local_spec
    from tests.parallel.training_runs import begin, settings

    ranks = {"expert_model_parallel_size": dist.get_world_size()}
    config = transformer_config(begin(settings(parallel=ranks))[0])
    config.moe_expert_capacity_factor = 1.0
    config.moe_pad_expert_input_to_capacity = True
    ours = {"upstream": MoEAlltoAllTokenDispatcher, "ours": FFNAlltoAllTokenDispatcher}
    moe_layer.MoEAlltoAllTokenDispatcher = ours[dispatcher]
    try:
        spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = spec.submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False)
    finally:
        moe_layer.MoEAlltoAllTokenDispatcher = MoEAlltoAllTokenDispatcher
    layer.set_layer_number(1)
    rank = parallel_state.get_expert_model_parallel_rank()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(layer.named_parameters()):
            seed = index if name.startswith("router") else 100 * (rank + 1) + index
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(0.3 * drawn)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(24, 1, config.hidden_size, generator=generator).requires_grad_()
    output, _ = layer(hidden)
    output.square().sum().backward()
    return {"output": output.detach().numpy(), "gradient": hidden.grad.numpy()}
