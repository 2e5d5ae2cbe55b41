"""Carries the judge's decisions out in the routers: tau, weights from before, FFN experts only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from moepp_megatron.moe.budget import set_taus
from moepp_megatron.moe.layer import moepp_layers
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.observe.guard_judge import Event, RuleJudge, Values, layers_in
from moepp_megatron.training.checkpoint.optimizer import copy_into_shard, is_distributed
from moepp_megatron.training.setup import TrainingModel

SAFE_MODE = "safe_mode"
# Steps between copies of the routers' weights.
COPY_INTERVAL = 10
# Tau times less than this is tau.
_LEAST_RAISE = 1.001


class RaisedTau:
    """Factor on tau in each MoE layer.

    It is the full factor while the action lasts; then its logarithm halves every `half_life` steps,
    because a sudden fall of tau would be a disturbance of its own. It also multiplies a budget's
    tau, whose controller takes the factor back as far as the share exceeds the target.

    Args:
        layer_numbers: Global numbers of all MoE layers.
        factor: `routing_guard.tau_factor`.
        half_life: `routing_guard.tau_half_life`, in steps.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        factor: float,
        half_life: float,
        state: Sequence[tuple[int, float]] = (),
    ) -> None:
        self._factor, self._half_life = factor, half_life
        known = {int(layer): float(value) for layer, value in state}
        self.factors = {layer: known.get(layer, 1.0) for layer in layer_numbers}

    def state(self) -> list[tuple[int, float]]:
        """The state for a checkpoint: layers whose tau is raised, and their factors."""
        return [(layer, factor) for layer, factor in self.factors.items() if factor != 1.0]

    def step(self, places: Collection[int]) -> None:
        """Update the factors; the action is in force in these layers, or `WHOLE_MODEL`."""
        raised = layers_in(places, self.factors)
        for layer, factor in self.factors.items():
            if layer in raised:
                self.factors[layer] = self._factor
            else:
                rest = factor**0.5 ** (1.0 / self._half_life)
                self.factors[layer] = rest if rest >= _LEAST_RAISE else 1.0


class RouterControl:
    """Sets this rank's routers."""

    def __init__(self, model: TrainingModel) -> None:
        self._models = model.models
        self._layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]

    def set_ffn_only(self, layers: Collection[int]) -> None:
        """Switch zero-computation experts off in these layers, by global number, on elsewhere."""
        for layer in self._layers:
            layer.router.ffn_only = layer.layer_number in layers

    def set_taus(self, taus: Mapping[int, float]) -> None:
        """Set tau by global layer number."""
        set_taus(self._models, dict(taus))


class RouterCopies:
    """Keeps, for each MoE layer, its router's weights of the newest step that proved them healthy.

    Every rank holds the routers of its own layers. Weights are copied before a step and kept after
    it, because the step shows how these weights route; those that its optimizer leaves are seen in
    the next.

    Args:
        model: The wrapped model.
        state: Result of an earlier `state()`, which may be of another layout.

    Attributes:
        steps: The step before which the copy of each layer's router was made, by the layer's global
            number; the same on every rank.
    """

    def __init__(self, model: TrainingModel, state: Sequence[Sequence[Any]] = ()) -> None:
        self._model = model
        layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]
        self._routers = {layer.layer_number: layer.router for layer in layers}
        self.steps: dict[int, int] = {layer: step for layer, step, _ in state}
        self._kept: dict[int, list[Tensor]] = {
            layer: [value.to(torch.cuda.current_device()) for value in values]
            for layer, _, values in state
            if layer in self._routers
        }
        self._taken: dict[int, list[Tensor]] = {}
        self._taken_at: int | None = None

    def state(self) -> list[list[Any]]:
        """The state for a checkpoint, the same on every rank; a collective."""
        own = {layer: [value.cpu() for value in values] for layer, values in self._kept.items()}
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[dict[int, list[Tensor]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(stages, own, group=group)
        values = {layer: copies for stage in stages for layer, copies in stage.items()}
        return [[layer, step, values[layer]] for layer, step in sorted(self.steps.items())]

    def take(self, step: int) -> None:
        """Copy the routers before `step`, if they are due."""
        self._taken, self._taken_at = {}, None
        if step % COPY_INTERVAL == 0:
            self._taken_at = step
            with self._model.gathered_parameters():
                self._taken = {
                    layer: [value.detach().clone() for value in _weights(router)]
                    for layer, router in self._routers.items()
                }

    def keep(self, layers: Collection[int]) -> None:
        """Keep what has been copied of these layers, which were healthy in the step."""
        if self._taken_at is not None:
            self.steps |= dict.fromkeys(layers, self._taken_at)
            self._kept |= {layer: self._taken[layer] for layer in layers if layer in self._taken}
        self._taken, self._taken_at = {}, None

    def put_back(self, layers: Iterable[int]) -> set[int]:
        """Give routers of these layers the weights that were kept; the layers that have a copy."""
        found = {layer for layer in layers if layer in self.steps}
        if found:
            with self._model.gathered_parameters(), torch.no_grad():
                for layer in sorted(found & self._routers.keys()):
                    # The bias is last: a run may have been resumed with one, and copies are older.
                    pairs = zip(_weights(self._routers[layer]), self._kept[layer], strict=False)
                    for weight, value in pairs:
                        _overwrite(self._model.optimizer, weight, value)
        return found


class SafeMode:
    """Carries the action out in the layers in which it is in force.

    A router that falls goes back to its weights from before the fall. Where there are none, or a
    rule holds with them too, zero-computation experts are switched off until the action ends.

    Args:
        model: The wrapped model.
        judge: Judges the rules.
        layer_numbers: Global numbers of all MoE layers.
        state: Result of an earlier `state()`.
    """

    def __init__(
        self,
        model: TrainingModel,
        judge: RuleJudge,
        layer_numbers: Sequence[int],
        state: Mapping[str, Any],
    ) -> None:
        self._judge, self._layers = judge, list(layer_numbers)
        self._copies = RouterCopies(model, state.get("copies", ()))
        # Layers whose routers have gone back, and route well since.
        self._mended = set(state.get("mended", ()))

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, the same on every rank; a collective."""
        return {"copies": self._copies.state(), "mended": sorted(self._mended)}

    def begin_step(self, step: int) -> None:
        """Training step `step` begins."""
        self._copies.take(step)

    def end_step(self, events: Sequence[Event], values: Values) -> None:
        """Act on a step that has been judged by `values`, with its beginnings and ends."""
        safe = self._in_force()
        healthy = self._judge.layers_where(SAFE_MODE, values, lambda rule, at: rule.is_healthy(at))
        self._copies.keep(healthy - safe)
        self._mended &= safe & self._judge.layers_where(
            SAFE_MODE, values, lambda rule, at: not rule.holds(at)
        )
        begun = {event.layer for event in events if event.begins and event.action == SAFE_MODE}
        self._mended |= self._copies.put_back(layers_in(begun, self._layers))

    def _in_force(self) -> set[int]:
        return layers_in(self._judge.places(SAFE_MODE), self._layers)

    def ffn_only(self) -> set[int]:
        """Layers whose zero-computation experts are switched off."""
        return self._in_force() - self._mended

    def note(self, event: Event) -> str:
        """Further text of an alert: where a router has gone back to."""
        if not event.begins or event.action != SAFE_MODE:
            return ""
        steps = [
            self._copies.steps[layer]
            for layer in layers_in({event.layer}, self._layers)
            if layer in self._mended
        ]
        if not steps:
            return "no copy of a healthy router to go back to"
        return f"the router has its weights of before step {min(steps)} again"


def _weights(router: MoEPPRouter) -> list[Tensor]:
    """All that decides how a router routes."""
    biases = [] if router.expert_bias is None else [router.expert_bias]
    return [*router.parameters(), *biases]


def _overwrite(optimizer: MegatronOptimizer, weight: Tensor, value: Tensor) -> None:
    """Put a value into a weight, and into what this rank has of its fp32 copy in the optimizer."""
    weight.copy_(value)
    main: Tensor | None = getattr(weight, "main_param", None)
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        if is_distributed(chained):
            copy_into_shard(chained, weight, value)
        elif main is not None:
            main.copy_(value.view_as(main))
