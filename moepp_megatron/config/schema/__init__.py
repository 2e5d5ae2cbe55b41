"""The sections of the configuration as pydantic models, each with its rules below its settings.

checkpoint.py        section `checkpoint`: saving and loading
config.py            the sections of the engine; `features.registry` adds those of features
data.py              section `data`: the corpus, blends and stages
latent_attention.py  section `model.latent_attention`: multi-head latent attention
megatron.py          section `megatron`: megatron-core's own settings of speed and memory
model.py             section `model`: the decoder around the experts
moe.py               section `moe`: experts and routing of MoE++ (arXiv 2410.07348)
observe.py           section `observe`: where records and alerts go
optimizer.py         section `optimizer`: the optimizer, its schedule, and groups of parameters
parallel.py          section `parallel`: how the model is laid out over ranks
precision.py         section `precision`: number formats, and how FP8 numbers are scaled
resilience.py        section `resilience`: the checks of a running run, and when they act
run.py               section `run`: folder, name, callbacks, parts
section.py           what every section of the configuration shares
slurm.py             section `slurm`: what `moepp slurm` asks the scheduler for
training.py          section `training`: batches, length, recomputation and logging
"""

from moepp_megatron.config.schema.data import BlendPart
from moepp_megatron.config.schema.observe import WandbSection
from moepp_megatron.config.schema.resilience import ResilienceSection
from moepp_megatron.config.schema.section import Section
from moepp_megatron.features.registry import (
    Config,
    DataSection,
    ModelSection,
    MoESection,
)

__all__ = [
    "BlendPart",
    "Config",
    "DataSection",
    "ModelSection",
    "MoESection",
    "ResilienceSection",
    "Section",
    "WandbSection",
]
