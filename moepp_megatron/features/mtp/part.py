"""The loss of multi-token prediction (MTP) of a step, over all ranks."""

from moepp_megatron.config import Layout
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.step_sums import first_of_tensor_ranks, sum_over_ranks, zeros


class MultiTokenPredictionPart(Part):
    """Reports the sums of `model.multi_token_loss`."""

    def __init__(self, run: PartContext) -> None:
        self._depths = run.config.model.mtp_num_layers
        models = run.model.models
        self._losses = [m.mtp_loss for m in models if getattr(m, "mtp_process", False)]

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True with such layers."""
        return bool(run.config.model.mtp_num_layers)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Start counting a new step."""
        for loss in self._losses:
            loss.reset()

    def record(self, step: Step, fields: Fields) -> Fields:
        """The mean over the depths; a collective."""
        total = zeros(self._depths, 2)
        for loss in self._losses:
            if loss.sums is not None and first_of_tensor_ranks():
                total += loss.sums
        losses, counts = sum_over_ranks(total).unbind(dim=-1)
        return {"mtp_loss": float((losses / counts).mean())}
