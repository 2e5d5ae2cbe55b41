"""Section `data`: the prepared corpus, and blends of several."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import ConfigPath, Section, Unit


class BlendPart(Section):
    """One folder of a blend."""

    path: Annotated[ConfigPath, Unit("-")]
    """Folder or prefix, as data.path"""
    weight: Annotated[float, Unit("1"), Field(ge=0)]
    """Share of the samples, before division by the sum of the blend's weights"""


class DataStage(Section):
    """One stage: a blend, and where it begins. A folder continues where it was left."""

    from_step: Annotated[int | None, Unit("steps"), Field(ge=1)] = None
    """Steps that the run has taken when the stage begins, refused batches included"""
    from_tokens: Annotated[float | None, Unit("tokens"), Field(gt=0)] = None
    """The same in tokens, rounded up to a whole step; instead of from_step"""
    blend: Annotated[list[BlendPart], Unit("-")]
    """Folders that are trained on together"""


class DataSection(Section):
    """The prepared corpus."""

    path: Annotated[ConfigPath | None, Unit("-")] = None
    """Folder written by `moepp data prepare`, or the prefix of Megatron's .bin and .idx; null where
    data.blend names several, or no data is read"""
    blend: Annotated[list[BlendPart], Unit("-")] = []
    """Folders that are trained on together, instead of data.path"""
    stages: Annotated[list[DataStage], Unit("-")] = []
    """Blends that replace the one before at a step or a number of tokens, in order"""
    validation: Annotated[dict[str, ConfigPath], Unit("-")] = {}
    """Further validation sets, {name: folder}, each with its own loss: the validation part of a
    folder that is trained on, all documents of any other"""
    cache: Annotated[ConfigPath | None, Unit("-")] = None
    """Folder for the order of samples, which all ranks must see; null: cache/ in the data folder"""
    tokenizer: Annotated[ConfigPath | None, Unit("-")] = None
    """Tokenizer file; null takes tokenizer.json in the (first) data folder"""
    dataset: Annotated[Literal["gpt"] | Annotated[str, Plugin("datasets")], Unit("-")] = "gpt"
    """Dataset that samples documents; gpt is megatron-core's, which shuffles documents and cuts
    them into sequences"""
    split: Annotated[str | None, Unit("1")] = None
    """Weights of the train, validation and test parts by documents, separated by commas; null takes
    the corpus's own (whole packages of the built-in one) or 98,2,0"""
    reset_attention_mask: Annotated[bool, Unit("-")] = False
    """Attention stays within documents; must be true for conversations (`moepp data prepare
    --chat`)"""
    reset_position_ids: Annotated[bool, Unit("-")] = False
    """Positions start at 0 in every document; changes metrics by position only, because rotary
    embeddings depend on distances"""
    eod_mask_loss: Annotated[bool, Unit("-")] = False
    """No loss where the input is the end-of-document token"""
    num_workers: Annotated[int, Unit("processes"), Field(ge=0)] = 0
    """Data loader processes per rank; 0 loads in the training process"""
