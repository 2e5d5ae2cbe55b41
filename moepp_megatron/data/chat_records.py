"""Conversations in the forms that people keep them in: messages, ShareGPT's, Alpaca's."""

from __future__ import annotations

import json
from typing import Any

from moepp_megatron.data.chat_template import ANSWERS, Message, UnusableChat
from moepp_megatron.data.documents import is_utf8

FORMS = (
    '{"messages": [{"role": "user", "content": "..."}, ...]}, '
    '{"conversations": [{"from": "human", "value": "..."}, ...]} or '
    '{"instruction": "...", "input": "...", "output": "..."}'
)
_ROLES = ("system", "developer", "user", ANSWERS, "tool")
# ShareGPT's names, as LLaMA-Factory and axolotl read them.
_SHAREGPT_ROLES = {"human": "user", "gpt": ANSWERS, "chatgpt": ANSWERS, "observation": "tool"}


def messages_of(record: dict[str, Any]) -> list[Message]:
    """The messages of a record.

    Raises:
        UnusableChat: They cannot be trained on.
    """
    messages = _messages(record)
    if not isinstance(messages, list) or not messages:
        raise UnusableChat("no messages, conversations, or instruction and output")
    if record.get("tools"):
        raise UnusableChat("tools, which templates are not given here")
    if not is_utf8(json.dumps(messages, ensure_ascii=False)):
        raise UnusableChat("a message is not UTF-8 text")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UnusableChat("a message without text as its content")
        if message.get("role") not in _ROLES:
            raise UnusableChat(f"a role other than {', '.join(_ROLES)}")
    answers = [message["content"] for message in messages if message["role"] == ANSWERS]
    if not answers:
        raise UnusableChat(f"no message of the role {ANSWERS}")
    if not all(answer.strip() for answer in answers):
        raise UnusableChat("an empty answer")
    return messages


def _messages(record: dict[str, Any]) -> Any:
    """Return the messages, unchecked; None if the record has none of the forms."""
    if "messages" in record:
        return record["messages"]
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = record.get("conversations")
    if isinstance(turns, list):
        return system + [_turn(each) for each in turns]
    if "instruction" in record and "output" in record:
        return system + _alpaca(record)
    return None


def _turn(turn: Any) -> Any:
    """A message of ShareGPT's `from` and `value`."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    name = turn["from"]
    role = _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
    return {"role": role, "content": turn.get("value")}


def _alpaca(record: dict[str, Any]) -> list[Any]:
    """Questions and answers before, and the record's: LLaMA-Factory joins its parts so, too."""
    asked = [part for part in (record["instruction"], record.get("input")) if part]
    is_text = all(isinstance(part, str) for part in asked)
    before = record.get("history") or []
    is_history = isinstance(before, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in before
    )
    pairs = [*(before if is_history else [(None, None)])]
    pairs.append(("\n".join(asked) if is_text else None, record["output"]))
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", ANSWERS), pair, strict=True)
    ]
