"""The current stage of a run's data, and when the next begins."""

import hashlib
import json
from collections.abc import Iterable

from moepp_megatron.config import Config
from moepp_megatron.config.blends import Blend, blend_at, blends_of
from moepp_megatron.data.verify import corpus_identity
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Part, PartContext, State, Why


class DataStagesPart(Part):
    """The stages of a run's data, and that of its newest batch."""

    key = "data_stages"

    def __init__(self, config: Config, consumed_samples: int) -> None:
        self._blends = blends_of(config)
        self._identities = {blend.name: _identity(blend) for blend in self._blends}
        current = blend_at(self._blends, consumed_samples)
        self._newest: str | None = self._identities[current.name]

    @classmethod
    def of(cls, run: PartContext) -> "DataStagesPart":
        """The part of a run."""
        return cls(run.config, run.progress.consumed_samples)

    def new_data(self, first_sample: int) -> str | None:
        """Why the next batch comes from a new stage, or new content after a resume; or None."""
        blend = blend_at(self._blends, first_sample)
        before, self._newest = self._newest, self._identities[blend.name]
        if self._newest == before:
            return None
        if blend is self._blends[0]:
            return f"{blend.name} holds another corpus or split than before"
        return f"{blend.name} begins: {blend.text}"

    def state(self) -> State:
        """The content of the newest batch's stage."""
        return {"corpus": self._newest}

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the stage of the newest batch."""
        self._newest = state.get("corpus", self._newest)
        return ()


def _identity(blend: Blend) -> str | None:
    """Identify the data of a blend: the tokens of its folders, and the shares."""
    identities = [corpus_identity(folder.path) for folder in blend.folders]
    if len(identities) == 1:
        return identities[0]
    shares = [folder.share for folder in blend.folders]
    text = json.dumps(sorted(zip(map(str, identities), shares, strict=True)))
    return hashlib.sha256(text.encode()).hexdigest()
