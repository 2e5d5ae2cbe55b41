"""Chat templates: conversations as the text that a model reads, and which of it are answers.

A template is a Jinja program that came with a tokenizer, so it runs in Jinja's sandbox, with the
names that Hugging Face's templates expect.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Never

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.regular_file import read_text
from moepp_megatron.data.long_text import MAX_PIECE_CHARACTERS
from moepp_megatron.data.tokenizer import Tokenizer, read_tokenizer_config, spelling, tokenizer_file
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

Message = dict[str, str]
ANSWERS = "assistant"
"""The role whose messages are answers."""
# Templates of published models have up to 20,000 characters.
_MAX_CHARACTERS = 1_000_000
# Of Unicode's private use: part of no special token, and no normalizer makes anything of it.
_PLACEHOLDER = "\ue000"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class UnusableChat(ValueError):
    """A conversation that a template cannot render, and why."""


class _Generation(Extension):
    """Renders the content of a template's `generation` block, which marks answers elsewhere."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Renders conversations and encodes them.

    Errors call the template `name`; its `eos_token` is the tokenizer's end-of-document token.
    A text that is no template raises ConfigError.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, name: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        # As Hugging Face's filter writes it; Jinja's own escapes for HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self._template = environment.from_string(text)
        except Exception as error:  # Jinja and Python's compiler raise many kinds
            reason = f"Jinja cannot compile it: {type(error).__name__}"
            if isinstance(error, jinja2.TemplateSyntaxError):
                reason = f"line {error.lineno}: {error.message}"
            raise ConfigError(
                f"{name} must be a Jinja template ({reason}); correct it, or name another with "
                "--template"
            ) from None
        self.text = text
        self.tokenizer = tokenizer

    @classmethod
    def find(cls, tokenizer_path: Path, tokenizer: Tokenizer, file: Path | None) -> "ChatTemplate":
        """Return the template of `file` (`--template`), or for None the one next to a tokenizer.

        Beside `tokenizer_path`, a `tokenizer.json` or its folder, that is `chat_template.jinja`, or
        else `chat_template` in `tokenizer_config.json`. Raises ConfigError if none can be read.
        """
        folder = tokenizer_file(tokenizer_path).parent
        content = read_tokenizer_config(folder)
        text, name = _named_template(content), f"chat_template in {folder / TOKENIZER_CONFIG_FILE}"
        path = file or folder / CHAT_TEMPLATE_FILE
        if file is not None or path.is_file():
            option = "chat template" if file is None else "--template"
            name = f"{option} ({path})"
            text = read_text(path, option, _MAX_CHARACTERS + 1)
            if len(text) > _MAX_CHARACTERS:
                raise ConfigError(f"{name} must have at most {_MAX_CHARACTERS} characters; cut it")
        if text is None:
            raise ConfigError(
                f"tokenizer ({tokenizer_path}) must have a chat template, in "
                f"{CHAT_TEMPLATE_FILE} or {TOKENIZER_CONFIG_FILE} next to it; put one there, or "
                "give moepp data prepare one with --template, such as examples/chat.jinja"
            )
        return cls(_with_tokens(text, content, tokenizer.eod_token), tokenizer, name)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Render a conversation, up to where an answer begins if that is asked for.

        Raises UnusableChat if the template refuses it.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                eos_token=self.tokenizer.eod_token,
            )
        except jinja2.TemplateError as error:
            reason = " ".join(str(error.message).split())
            raise UnusableChat(f"the template refuses it: {reason}") from None
        except Exception as error:  # a template is a program of somebody else's
            raise UnusableChat(f"the template fails: {type(error).__name__}") from None

    def prompt(self, text: str) -> str:
        """Render a user's message as a prompt, up to where the answer begins.

        Raises ConfigError if it spells a special token, or the template refuses it.
        """
        messages = [{"role": "user", "content": text}]
        try:
            self._check_content(messages)
            rendered = self.render(messages, add_generation_prompt=True)
            ids, _ = self.tokenizer.encode_with_spans(rendered, has_special_tokens=True)
            self._check_rendered(messages, ids, add_generation_prompt=True)
            return rendered
        except UnusableChat as error:
            raise ConfigError(
                f"--prompt ({text[:40]!r}) cannot be a message: {error}; change it"
            ) from None

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], NDArray[np.bool_]]:
        """Return the token ids of a conversation, and a mask of those that a model is to learn.

        It learns what the template adds for an answer after the beginning of one: the answer and
        what ends it, up to the end-of-document token if that is in it. UnusableChat is raised if
        the template or the tokenizer cannot do it.
        """
        self._check_content(messages)
        text = self.render(messages)
        if len(text) > MAX_PIECE_CHARACTERS:
            raise UnusableChat(f"more than {MAX_PIECE_CHARACTERS} characters")
        ids, spans = self.tokenizer.encode_with_spans(text, has_special_tokens=True)
        self._check_rendered(messages, ids)
        starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        is_learnt = np.zeros(len(ids), dtype=np.bool_)
        for index, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            until = self.render(messages[: index + 1])
            if not (until.startswith(before) and text.startswith(until)):
                raise UnusableChat(
                    "the template changes earlier messages, or what begins an answer, when later "
                    "ones follow"
                )
            if ((starts < len(before)) & (ends > len(before))).any():
                # `moepp generate` asks for an answer after only the tokens of `before`.
                raise UnusableChat("an answer begins in the middle of a token")
            own = (starts >= len(before)) & (ends <= len(until)) & (ends > starts)
            # What stands after the token that ends generation is never generated.
            over = own & (np.array(ids) == self.tokenizer.eod)
            is_learnt |= own & (over.cumsum() - over == 0)
        # What begins a conversation is predicted from nothing.
        is_learnt[:1] = False
        if not is_learnt.any():
            raise UnusableChat("no token of an answer")
        return ids, is_learnt

    def _check_content(self, messages: Sequence[Message]) -> None:
        # Whole messages: templates render names and tool calls, too.
        text = json.dumps(messages, ensure_ascii=False)
        for token in self.tokenizer.special_tokens.values():
            if json.dumps(token, ensure_ascii=False)[1:-1] in text:
                # It would end a message, or a document, where the author only wrote of it.
                raise UnusableChat(f"a message spells the special token {token}")

    def _check_rendered(
        self, messages: Sequence[Message], ids: Sequence[int], add_generation_prompt: bool = False
    ) -> None:
        """Refuse special tokens that a template makes of a message: by `trim`, or around it."""
        neutral = [
            {key: text if key == "role" else self._neutral(text) for key, text in message.items()}
            for message in messages
        ]
        text = self.render(neutral, add_generation_prompt)
        # One for a run of them: what encodes fast.
        text = re.sub(f"{_PLACEHOLDER}+", _PLACEHOLDER, text)
        expected, _ = self.tokenizer.encode_with_spans(text, has_special_tokens=True)
        special = self.tokenizer.special_tokens
        pairs = zip_longest(*([i for i in each if i in special] for each in (ids, expected)))
        for found, own in pairs:
            if found != own:
                token = special[own if found is None else found]
                raise UnusableChat(f"by the template, a message spells or hides {token}")

    def _neutral(self, value: Any) -> Any:
        """A value with nothing in its texts that could be a part of a special token."""
        if isinstance(value, str):
            return re.sub(r"\S", _PLACEHOLDER, value)
        if isinstance(value, list):
            return [self._neutral(each) for each in value]
        if isinstance(value, dict):
            # What the template spells it asks for by name.
            return {
                key if key in self.text else self._neutral(key): self._neutral(each)
                for key, each in value.items()
            }
        return value


def _refuse(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _with_tokens(text: str, content: dict[str, Any], eod_token: str) -> str:
    """The template with the special tokens that it names, which are not written again."""
    lines = []
    for name in _SPECIAL_TOKENS:
        token = spelling(content.get(name))
        if token is not None and name in text and (name, token) != ("eos_token", eod_token):
            lines.append(f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n")
    return "".join(lines) + text


def _named_template(content: dict[str, Any]) -> str | None:
    """`chat_template`: a text, or several with names, of which one is the default."""
    template = content.get("chat_template")
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
