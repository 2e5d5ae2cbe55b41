"""Checks that a configuration's data exist, fit its model and have the ids of its tokenizer.

Two tokenizers of equal size number different texts: a model trained on one and prompted through the
other answers nonsense, and nothing fails.
"""

import hashlib
from pathlib import Path

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.blends import Folder, blends_of, folders_of
from moepp_megatron.config.flops import forward_flops_per_token
from moepp_megatron.config.parameters import count_parameters
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.data.index import CorpusError
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.split import check_set, check_split
from moepp_megatron.data.tokenizer import Tokenizer, named_eod_token, tokenizer_file
from moepp_megatron.data.verify import check_start, damaged, pair_warnings, read_manifest
from moepp_megatron.file_names import TOKENIZER_FILE

# From this share of a token's FLOPs on, rows of the output layer without a token are worth a word.
_WASTED_SHARE = 0.05
# Model sizes are multiples of it: of what GPUs multiply well, and of tensor parallel sizes.
_VOCAB_MULTIPLE = 128
# Characters of a hash in messages.
_SHOWN = 16


def check_data(config: Config, whole_index: bool = True) -> list[str]:
    """Refuse what training would refuse, before any rank starts; return warnings.

    One process per run reads the whole index, 20 bytes per document; for others the header will do.
    Raises ConfigError for a folder that is no prepared one, is damaged, or has more tokens than the
    model or too few documents for the split, and for a tokenizer that it was not prepared with.
    """
    data, blends = config.data, blends_of(config)
    if not blends:
        raise ConfigError("data.path (null) must name a prepared folder; see: moepp data prepare")
    tokens, warnings = 0, []
    validates = config.training.eval_iters > 0
    validated = {folder.real for folder in blends[0].folders if validates}
    sets = [Folder(f"data.validation.{name}", path) for name, path in data.validation.items()]
    for folder in (*folders_of(blends).values(), *sets):
        manifest = read_manifest(folder)
        if manifest.is_bare:
            size, of_pair = _check_pair(config, folder, whole_index)
            warnings += of_pair
        else:
            check_start(folder, manifest, whole_index)
            if manifest.chat is not None:
                _check_chat(config, manifest, folder)
            _check_corpus_tokenizer(config, manifest, folder)
            size = manifest.vocab_size
        if size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size ({config.model.vocab_size}) must hold every token of "
                f"{folder.name} ({size}); use {size} or more"
            )
        tokens = max(tokens, size)
        if folder in sets:
            check_set(folder, blends, data.split, manifest)
        else:
            check_split(data.split, manifest, folder.real in validated, folder)
    return [*_wasted_vocabulary(config, tokens, blends[0].name), *warnings]


def _check_pair(config: Config, folder: Folder, whole_index: bool) -> tuple[int, list[str]]:
    """Size of the vocabulary of a `PREFIX.bin` and `PREFIX.idx`, and what cannot be checked."""
    if config.data.tokenizer is None:
        raise ConfigError(
            f"data.tokenizer (null) must be given, because {folder} is a pair "
            "of .bin and .idx without a tokenizer; name the one that has made its ids"
        )
    tokenizer = Tokenizer.load(config.data.tokenizer)
    try:
        warnings = pair_warnings(folder, tokenizer) if whole_index else []
    except (CorpusError, OSError) as error:
        raise damaged(folder, str(error)) from None
    return tokenizer.vocab_size, warnings


def check_sequence_length(sequence_length: int, manifest: Manifest, folder: Folder) -> None:
    """Raise ConfigError for another length of sequences than conversations were put into."""
    if manifest.chat is not None and manifest.chat.sequence_length != sequence_length:
        raise ConfigError(
            f"model.seq_length ({sequence_length}) must be the --seq-length that {folder} "
            f"was prepared with ({manifest.chat.sequence_length}), whose sequences "
            "hold whole conversations; use the same, or prepare it again"
        )


def _check_chat(config: Config, manifest: Manifest, folder: Folder) -> None:
    """Refuse settings with which conversations would be trained on in another way than prepared."""
    check_sequence_length(config.model.seq_length, manifest, folder)
    what = f"{folder}, which holds conversations"
    data = config.data
    if data.blend or data.stages or data.validation:
        raise ConfigError(
            f"{what}, cannot be combined with other folders, whose samples have no padding; "
            "name it as data.path, without data.blend, data.stages and data.validation"
        )
    if tokenizer_of_run(config).parent.resolve() != folder.path.resolve():
        raise ConfigError(
            f"data.tokenizer ({data.tokenizer}) must be null with {what}: checkpoints take "
            "the chat template next to the tokenizer; leave it out"
        )
    if not data.reset_attention_mask:
        raise ConfigError(
            f"data.reset_attention_mask (false) must be true with {what}, several in a "
            "sequence, which must not see each other; set it to true"
        )
    if data.eod_mask_loss:
        raise ConfigError(
            f"data.eod_mask_loss (true) must be false with {what} and says itself which "
            "tokens have loss; leave it out"
        )
    if config.moe.is_vanilla:
        _check_vanilla_padding(config, f"for vanilla layers with {what} and padding")


def _check_vanilla_padding(config: Config, when: str) -> None:
    """Refuse what megatron-core's own router does not compute over tokens without padding."""
    moe, parallel = config.moe, config.parallel
    if moe.capacity_factor is not None:
        raise ConfigError(
            f"moe.capacity_factor ({moe.capacity_factor}) must be null {when}: megatron-core lets "
            "padding take experts' places; leave it out, or add zero-computation experts"
        )
    for key in ("tensor_model_parallel_size", "context_parallel_size"):
        size = getattr(parallel, key)
        if size > 1 and moe.balance_coeff > 0:
            raise ConfigError(
                f"parallel.{key} ({size}) must be 1 {when}: megatron-core weighs the balance loss "
                "on each rank by that rank's own tokens, of which padding leaves them unequal "
                "numbers; use 1, moe.balance_coeff 0, or zero-computation experts"
            )


def _wasted_vocabulary(config: Config, tokens: int, name: str) -> list[str]:
    """A warning where much of the output layer is for tokens that the tokenizer does not have."""
    model = config.model
    enough = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    rows = max(model.vocab_size - enough, 0)
    flops = forward_flops_per_token(config, config.moe.ffn_share)
    share = 2 * model.hidden_size * rows / flops
    if share < _WASTED_SHARE:
        return []
    parameters = rows * model.hidden_size * (1 if model.tie_embeddings else 2)
    return [
        f"model.vocab_size ({model.vocab_size}) is far larger than the vocabulary of {name} "
        f"({tokens}): {parameters / 1e6:,.1f} of {count_parameters(config).total / 1e6:,.1f} M "
        f"parameters and {share:.0%} of the FLOPs of a token are for tokens that do not exist; "
        f"set model.vocab_size={enough}, or prepare the data with --vocab-size "
        f"{model.vocab_size} or a --tokenizer of that size"
    ]


def tokenizer_of_run(config: Config) -> Path:
    """The `tokenizer.json` of a run: `data.tokenizer`, or the one in the first data folder."""
    blends = blends_of(config)
    path = config.data.tokenizer or (blends[0].folders[0].path if blends else None)
    assert path is not None, "training needs data.path"
    return tokenizer_file(path)


def _check_corpus_tokenizer(config: Config, manifest: Manifest, folder: Folder) -> None:
    """Refuse a tokenizer with other ids or another end of documents than a folder's."""
    file, own = tokenizer_of_run(config), folder.path / TOKENIZER_FILE
    digest = _sha256(file)
    is_same = digest == manifest.tokenizer_sha256 or (
        own.is_file()
        and _sha256(own) == manifest.tokenizer_sha256
        and _content(file) == _content(own)
    )
    if is_same:
        _check_end_of_document(file, manifest, folder)
        return
    of_corpus = f"SHA-256 {manifest.tokenizer_sha256[:_SHOWN]}... in its manifest"
    if file == own:
        raise ConfigError(
            f"{folder} must hold the {TOKENIZER_FILE} that its text was "
            f"tokenized with ({of_corpus}), and holds another (SHA-256 {digest[:_SHOWN]}...); put "
            "that one back, or prepare the text again"
        )
    if config.data.tokenizer is None:
        raise ConfigError(
            f"{folder.name} ({folder.path}, {of_corpus}) must be tokenized with the tokenizer of "
            f"the first folder ({file}, SHA-256 {digest[:_SHOWN]}...); prepare its text again with "
            f"--tokenizer {file}, or leave it out"
        )
    raise ConfigError(
        f"data.tokenizer ({file}, SHA-256 {digest[:_SHOWN]}...) must be the one that {folder} was "
        f"tokenized with ({of_corpus}); leave data.tokenizer out, or "
        f"prepare the text again with --tokenizer {file}"
    )


def _check_end_of_document(file: Path, manifest: Manifest, folder: Folder) -> None:
    """Masks, generation and metrics look for one token, whichever folder a sample is of."""
    eod_token = named_eod_token(file) or Tokenizer.load(file).eod_token
    if eod_token != manifest.eod_token:
        raise ConfigError(
            f"{folder} must end documents with {eod_token}, the "
            f"end-of-document token of {file}, and ends them with {manifest.eod_token}; prepare "
            f"its text again with --eod-token '{eod_token}', or name another tokenizer or folder"
        )


def check_model_tokenizer(config: Config, trained: Path) -> None:
    """Raise ConfigError for data whose token ids mean other tokens than those a model learnt."""
    blends = blends_of(config)
    if not blends or not trained.is_file():
        return
    file = tokenizer_of_run(config)
    here, there = _sha256(file), _sha256(trained)
    if here == there:
        return
    try:
        wanted = _vocabulary(trained)
    except ConfigError:
        return
    if _vocabulary(file) != wanted:
        raise ConfigError(
            f"{blends[0].name} ({blends[0].text}) has a tokenizer ({file}, SHA-256 "
            f"{here[:_SHOWN]}...) whose ids must mean the tokens that {trained.parent} was "
            f"trained on ({TOKENIZER_FILE} there: SHA-256 {there[:_SHOWN]}...); prepare the text "
            f"again with --tokenizer {trained}, or start from another checkpoint"
        )


def _sha256(path: Path) -> str:
    try:
        check_regular(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"tokenizer ({path}) cannot be read ({error.strerror}); name another data.tokenizer, "
            "or prepare the text again"
        ) from error


def _content(path: Path) -> str:
    return Tokenizer.load(path).unique_identifiers["sha256"]


def _vocabulary(path: Path) -> dict[str, int]:
    return Tokenizer.load(path).vocabulary
