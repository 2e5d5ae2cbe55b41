"""Fills a trace: runs a checkpoint over the windows of a text and keeps every router's decisions.

Shape suffixes: T local tokens of a micro-batch, E all experts, K selected per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moepp_megatron.interop.score import ScoreRequest
from moepp_megatron.interop.scoring import score_stages, scoring_stages
from moepp_megatron.moe.layer import decoder_moepp_layers
from moepp_megatron.moe.selection import Routing
from moepp_megatron.runtime.distributed import build_groups
from moepp_megatron.tools.inspection.findings import Trace
from moepp_megatron.tools.inspection.request import InspectRequest


class _RecordedPass(NamedTuple):
    """One router's decisions for one micro-batch: [T, K] experts and gates, largest gate first."""

    selected: np.ndarray
    gates: np.ndarray


@contextmanager
def recorded_routing(
    stages: Sequence[torch.nn.Module],
) -> Iterator[dict[int, list[_RecordedPass]]]:
    """Record the routers' micro-batches in order, by global MoE layer number."""
    passes: dict[int, list[_RecordedPass]] = {}
    with ExitStack() as hooks:
        # Layers of multi-token prediction run only in training.
        for layer in [layer for stage in stages for layer in decoder_moepp_layers(stage)]:
            passes[layer.layer_number] = []
            keep = _keep(layer.moepp.router_topk, passes[layer.layer_number])
            hooks.callback(layer.router.register_forward_hook(keep).remove)
        yield passes


def _keep(topk: int, passes: list[_RecordedPass]) -> Any:
    def hook(router: torch.nn.Module, arguments: Any, routing: Routing) -> None:
        selected, gates = _selected_experts(routing.gates, routing.routing_map, topk)
        passes.append(_RecordedPass(selected.cpu().numpy(), gates.double().cpu().numpy()))

    return hook


def _selected_experts(gates: Tensor, routing_map: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return [T, K] int64 selected experts and their gates, the largest gate first."""
    # A selected expert's gate may be 0: a zero expert's under gate_normalization nonzero.
    ranked = gates.masked_fill(~routing_map, -1.0)
    order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    return order, gates.gather(1, order)


def trace_model(request: InspectRequest) -> Trace | None:
    """Run the model; every rank must call, with torch's group only, and all but rank 0 get None.

    The trace joins the windows, without the last one's fillers.
    """
    model, scoring, count = request.model, request.model.scoring, len(request.text)
    build_groups(scoring.config, scoring.layout)
    stages = scoring_stages(scoring)
    with recorded_routing(stages) as passes:
        scores = score_stages(scoring, stages)
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_placed(scoring, passes), everyone)
    parallel_state.destroy_model_parallel()
    if everyone is None or scores is None:
        return None
    selected, gates = (
        each.reshape(len(model.layers), -1, each.shape[-1])[:, :count]
        for each in _assemble(scoring, [piece for pieces in everyone for piece in pieces])
    )
    losses = np.full(scoring.input_ids.shape, np.nan)
    losses[:, 1:] = -scores["token_logprobs"]
    return Trace(model, selected, gates, losses.reshape(-1)[:count])


# Layer, sequence, positions [T] in it, and what the layer's router decided there.
_Piece = tuple[int, int, np.ndarray, _RecordedPass]


def _placed(request: ScoreRequest, passes: dict[int, list[_RecordedPass]]) -> list[_Piece]:
    """This rank's decisions with the positions of their tokens; fillers are left out."""
    count, length = request.input_ids.shape
    positions = _positions(request.config.model.seq_length)
    rank, size = parallel_state.get_data_parallel_rank(), request.layout.dp
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pieces = []
    for layer, of_layer in passes.items():
        for step, record in enumerate(of_layer):
            sequence = step * size + rank
            places = positions
            if len(record.selected) != len(positions):
                # Sequence parallelism: this tensor rank routed its part of the sequence.
                places = np.split(positions, len(positions) // len(record.selected))[tensor_rank]
            elif tensor_rank > 0:
                continue
            if sequence < count:
                inside = places < length
                kept = _RecordedPass(record.selected[inside], record.gates[inside])
                pieces.append((layer, sequence, places[inside], kept))
    return pieces


def _positions(length: int) -> np.ndarray:
    """[s'] places of this context rank's tokens in a sequence."""
    batch = {"position_ids": torch.arange(length).unsqueeze(0).to(torch.cuda.current_device())}
    group = parallel_state.get_context_parallel_group()
    mine = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return mine["position_ids"][0].cpu().numpy()


def _assemble(request: ScoreRequest, pieces: list[_Piece]) -> tuple[np.ndarray, np.ndarray]:
    """[L, b, s, K] experts and gates from the pieces of all ranks."""
    numbers = sorted({number for number, *_ in pieces})
    shape = (len(numbers), *request.input_ids.shape, request.config.moe.router_topk)
    selected, gates = np.full(shape, -1, dtype=np.int64), np.full(shape, np.nan)
    for number, sequence, places, record in pieces:
        layer = numbers.index(number)
        selected[layer, sequence, places] = record.selected
        gates[layer, sequence, places] = record.gates
    assert (selected >= 0).all(), "some tokens were routed by no rank"
    return selected, gates
