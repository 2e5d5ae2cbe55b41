"""Memory of a run's teacher on one rank."""

from __future__ import annotations

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.training.teacher import TeacherModel
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.parameters import rank_parameters
from moepp_megatron.workbench.planning.workload import Workload


def teacher_bytes(config: Config, layout: Layout, pp_rank: int) -> float:
    """Bytes that the teacher of a checked configuration adds to each rank of a pipeline stage.

    Its weights; on the last stage its last hidden states, and what comparing a micro-batch's logits
    needs: its own, and both models' and their difference in fp32. This comes before the buffers of
    the model's own loss, so their sum is an estimate from above. Buffers of its layers are not
    counted: those of the model take their place.

    Returns:
        0 without a teacher.

    Raises:
        ConfigError: There is no such teacher, or it does not fit the run.
    """
    teacher = TeacherModel.of(config)
    if teacher is None:
        return 0.0
    theirs = teacher.config
    stages = stage_layers(theirs)
    load, grid = Workload.from_config(theirs), Grid.from_layout(theirs, layout)
    parameters = rank_parameters(load, grid, stages, pp_rank)
    weights = float(load.numbers.weight_bytes * (parameters.dense + parameters.experts))
    if pp_rank < layout.pp - 1:
        return weights
    size, own = load.numbers.activation_bytes, grid.tokens(load.seq)
    ahead = layout.num_microbatches if layout.pp > 1 else 1
    hidden = float(ahead * own * load.hidden * size)
    return weights + hidden + own * load.vocab * (size + 3 * 4.0)
