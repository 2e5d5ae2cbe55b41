"""Conversations: what is read, what is learnt, how they lie in sequences, what is left out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
import torch
from pyarrow import parquet

from moepp_megatron.config import parse_config
from moepp_megatron.data.chat_template import ChatTemplate, UnusableChat
from moepp_megatron.data.datasets import build_datasets
from moepp_megatron.data.manifest import Manifest
from moepp_megatron.data.prepare import PrepareSettings, prepare
from moepp_megatron.data.prepare_chat import _messages_of, _pack
from moepp_megatron.data.prepared_data import check_data
from moepp_megatron.data.samples import DOCUMENTS, PADDING
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.data.verify import verify
from moepp_megatron.file_names import CHAT_TEMPLATE_FILE
from tests.parallel.training_runs import VANILLA, settings
from tests.refusals import config_error

LENGTH = 64
CHATML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def turn(role, content):
    return {"role": role, "content": content}


def chat(number):
    question = turn("user", f"what is {number}?")
    again = [turn("user", "sure?"), turn("assistant", "yes")] if number % 3 == 0 else []
    system = [turn("system", "be brief")] if number % 2 else []
    return [*system, question, turn("assistant", "a number " * (1 + number % 3)), *again]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of ChatML, of which one ends documents."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(chat(n)) for n in range(40)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def prepared(source, of_model, out, **changes):
    values = {"chat": True, "tokenizer": of_model, "sequence_length": LENGTH} | changes
    return prepare(source, out, PrepareSettings(**values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder):
    base = tmp_path_factory.mktemp("chat")
    source = write(base / "chats.jsonl", [{"messages": chat(n)} for n in range(60)])
    prepared(source, tokenizer_folder, base / "out")
    return base / "out"


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """Prepares records."""

    def of(records, **changes):
        source = write(tmp_path / "chats.jsonl", records)
        return prepared(source, tokenizer_folder, tmp_path / "out", **changes)

    return of


def samples(folder, count=8, **changes):
    tokenizer = Tokenizer.load(folder)
    numbers = (count, 0, 0)
    return build_datasets(folder, tokenizer, LENGTH, "1,0,0", 5, numbers, **changes)[0], tokenizer


def test_every_answer_is_learnt_and_nothing_else(folder):
    """From the samples as training reads them, an epoch of them, back to the conversations."""
    manifest = Manifest.read(folder)
    train, tokenizer = samples(folder, manifest.documents)
    assert len(train) == manifest.documents
    seen, learnt, padding = [], 0, 0
    for sample in (train[i] for i in range(len(train))):
        padded = sample[PADDING]
        padding += int(padded.sum())
        assert (padded.int().diff() >= 0).all(), "padding is at the end"
        assert not sample["loss_mask"][padded].any()
        learnt += int(sample["loss_mask"].sum())
        for number in sample[DOCUMENTS][~padded].unique():
            where = (sample[DOCUMENTS] == number) & ~padded
            text = tokenizer.decode(sample["tokens"][where].tolist())
            seen.append(text)
            # A label with loss is the next token, of the same conversation.
            mask = sample["loss_mask"][where] > 0
            assert torch.equal(sample["labels"][where][:-1], sample["tokens"][where][1:])
            assert not mask[-1], "nothing follows in this conversation"
            answers = re.findall(r"assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
            assert tokenizer.decode(sample["labels"][where][mask].tolist()) == "".join(answers)
    expected = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat(n))
        for n in range(60)
    ]
    assert sorted(seen) == sorted(expected)
    assert (manifest.chat.answer_tokens, manifest.chat.padding_tokens) == (learnt, padding)
    assert manifest.chat.conversations == 60


def test_order_differs_by_epoch_and_holds_whole_epochs(folder):
    sequences = Manifest.read(folder).documents
    train, _ = samples(folder, 3 * sequences)
    rows = [tuple(train[i]["tokens"].tolist()) for i in range(3 * sequences)]
    assert len(set(rows)) == sequences
    assert all(rows.count(row) == 3 for row in set(rows))


def test_positions_start_anew_if_asked(folder):
    train, _ = samples(folder, reset_position_ids=True)
    for sample in (train[i] for i in range(8)):
        for number in sample[DOCUMENTS].unique():
            own = sample["position_ids"][sample[DOCUMENTS] == number]
            assert torch.equal(own, torch.arange(len(own)))


def test_packing_fills_and_never_crosses():
    lengths = np.random.RandomState(1).randint(1, 40, 500).tolist()
    packs = _pack(lengths, np.random.RandomState(2).permutation(500), 100)
    assert sorted(index for each in packs for index in each) == list(range(500))
    sums = [sum(lengths[index] for index in each) for each in packs]
    assert max(sums) <= 100
    # Best fit; 102 would be full from end to end.
    assert len(packs) <= 104


BAD = {
    "no answer": ({"messages": [turn("user", "hm")]}, "no message of the role assistant"),
    "unknown role": ({"messages": [turn("robot", "hm"), *chat(1)]}, "a role other than system, "),
    "empty answer": (
        {"messages": [turn("user", "hm"), turn("assistant", " \n")]},
        "an empty answer",
    ),
    "no text": ({"messages": [turn("user", ["hm"])]}, "a message without text as its content"),
    "no role": ({"messages": [{"content": "hm"}]}, "a role other than"),
    "no messages": ({"text": "hm"}, "no messages, conversations, or instruction and output"),
    "not an object": ([1], "not a JSON object"),
    "half a surrogate": ({"messages": [turn("user", "\ud800")]}, "a message is not UTF-8 text"),
    "half a surrogate beside": (
        {"messages": [{**turn("user", "hm"), "name": "\ud800"}]},
        "a message is not UTF-8 text",
    ),
    "tools": ({"messages": chat(1), "tools": [{"name": "search"}]}, "tools, which templates"),
    "special token in a name": (
        {"messages": [{**turn("user", "hm"), "name": "<|im_end|>"}, *chat(2)]},
        "a message spells the special token <|im_end|>",
    ),
    "too long": ({"messages": [*chat(1), turn("user", "so " * LENGTH)]}, "longer than 64 tokens"),
    "special token": (
        {"messages": [turn("user", "print <|im_end|>"), turn("assistant", "no")]},
        "a message spells the special token <|im_end|>",
    ),
}


def test_what_is_left_out_is_counted_by_reason(make):
    records = [record for record, _ in BAD.values()]
    manifest = make([*records, {"messages": chat(2)}, records[0]]).manifest
    assert manifest.skipped == len(BAD) + 1
    for _, reason in BAD.values():
        assert any(each.startswith(reason) for each in manifest.skipped_reasons), reason
    assert manifest.skipped_reasons["no message of the role assistant"] == 2
    assert sum(manifest.skipped_reasons.values()) == manifest.skipped
    assert manifest.sources[0].documents == 1
    assert manifest.documents == 1


def test_a_source_with_nothing_usable_is_refused(make, tmp_path):
    record, reason = BAD["no answer"]
    with config_error("has no usable conversation") as caught:
        make([record])
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_template_is_another_folder(folder, tokenizer_folder, tmp_path):
    source = folder.parent / "chats.jsonl"
    assert prepared(source, tokenizer_folder, folder).up_to_date
    other = tmp_path / "other.jinja"
    other.write_text(CHATML.replace("\n{{ message", " {{ message"))
    with config_error("already holds another dataset .template is"):
        prepared(source, tokenizer_folder, folder, template=other)
    text = PrepareSettings(tokenizer=tokenizer_folder, text_key="messages")
    with config_error("has no usable document|already holds another"):
        prepare(source, folder, text)


def test_reasons_stay_few(make, tmp_path):
    """A template may tell each conversation another one."""
    file = tmp_path / "template.jinja"
    refusal = "{% if messages[0].content[-1] == '1' %}"
    refusal += "{{ raise_exception('no\\n' ~ messages[0].content) }}"
    file.write_text(refusal + "{% endif %}" + CHATML)
    records = [
        {"messages": [turn("user", f"{n} {n % 2}"), turn("assistant", "yes")]} for n in range(120)
    ]
    manifest = make(records, template=file).manifest
    assert manifest.skipped_reasons["the template refuses it: no 1 1"] == 1
    assert manifest.skipped_reasons["another reason"] == 10
    assert len(manifest.skipped_reasons) == 51


@pytest.mark.parametrize("trims", [False, True])
def test_white_space_of_answers_is_learnt(tokenizer_folder, tmp_path, trims):
    """Also where a post-processor such as Llama 3's takes it out of the tokens' spans."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    if trims:
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path, "<|im_end|>")
    content = tokenizer.content()
    answer = "  def f():\n\n    return 1\n\n"
    template = ChatTemplate(CHATML, tokenizer, "it")
    ids, learnt = template.encode([turn("user", " a "), turn("assistant", answer)])
    assert tokenizer.decode(np.array(ids)[learnt].tolist()) == f"{answer}<|im_end|>"
    assert tokenizer.content() == content


HELLO = [turn("user", "hi"), turn("assistant", "hello")]
FORMS = {
    "messages": ({"messages": HELLO}, HELLO),
    "sharegpt": (
        {
            "id": "x_0",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"},
                {"from": "user", "value": "a\nb"},
                {"from": "assistant", "value": "c"},
            ],
        },
        [*HELLO, turn("user", "a\nb"), turn("assistant", "c")],
    ),
    "sharegpt, system": (
        {
            "system": "be short",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "hello"},
            ],
        },
        [turn("system", "be short"), HELLO[0], turn("tool", "3"), HELLO[1]],
    ),
    "sharegpt, names of messages": ({"conversations": HELLO}, HELLO),
    "alpaca": (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        [turn("user", "Add\n1, 2"), turn("assistant", "3")],
    ),
    "alpaca, no input": ({"instruction": "hi", "input": "", "output": "hello"}, HELLO),
    "alpaca, history": (
        {"instruction": "hi", "output": "hello", "system": "s", "history": [["a", "b"]]},
        [turn("system", "s"), turn("user", "a"), turn("assistant", "b"), *HELLO],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_records(name, tokenizer_folder, tmp_path):
    record, messages = FORMS[name]
    assert _messages_of(record) == messages
    one = write(tmp_path / "one.jsonl", [record])
    other = write(tmp_path / "other.jsonl", [{"messages": messages}])
    written = [
        prepared(each, tokenizer_folder, tmp_path / each.stem).manifest for each in (one, other)
    ]
    assert written[0].sha256 == written[1].sha256


def test_rows_of_parquet_are_conversations(tokenizer_folder, tmp_path):
    for name, (record, messages) in FORMS.items():
        table = pyarrow.Table.from_pylist([record, {**record, "id": "other"}])
        parquet.write_table(table, tmp_path / "a.parquet")
        source = tmp_path / "a.parquet"
        out = tmp_path / name.replace(" ", "_")
        manifest = prepared(source, tokenizer_folder, out).manifest
        assert manifest.chat.conversations == 2
        template = ChatTemplate.find(out, Tokenizer.load(out), None)
        assert manifest.chat.answer_tokens == 2 * template.encode(messages)[1].sum()


WRONG_FORMS = {
    "no value": {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]},
    "a text": {"conversations": [{"from": "human", "value": ["a"]}, {"from": "gpt", "value": "b"}]},
    "strange name": {"conversations": [{"from": ["human"], "value": "a"}]},
    "a call": {"conversations": [{"from": "function_call", "value": "a"}]},
    "no list": {"conversations": "hm"},
    "no turn": {"conversations": [1]},
    "instruction": {"instruction": 5, "output": "b"},
    "output": {"instruction": "a", "output": None},
    "no output": {"instruction": "a", "input": "b"},
    "history": {"instruction": "a", "output": "b", "history": [["c"]]},
    "history's text": {"instruction": "a", "output": "b", "history": [["c", 1]]},
    "system": {"system": 5, **FORMS["alpaca"][0]},
}


@pytest.mark.parametrize("name", WRONG_FORMS)
def test_wrong_records_are_left_out(name):
    with pytest.raises(UnusableChat):
        _messages_of(WRONG_FORMS[name])


# How a template writes a message, and messages that spell the token `<|im_end|>` by that.
SPELLING = {
    "trim": ("{{ m.content | trim }}|>", "<|im_end "),
    "replace": ("{{ m.content | replace('~', '') }}", "<|im~_end|>"),
    "split": ("{{ m.content.split('#') | join }}", "<|im_#end|>"),
    "case": ("{{ m.content | lower }}", "<|IM_END|>"),
    "around": ("<|{{ m.content }}|>", "im_end"),
    "two contents": ("{{ m.content }}{{ m.name }}", {"content": "<|im_", "name": "end|>"}),
    "a key": (
        "{% for k in m.get('args', {}) %}{{ k | trim }}{% endfor %}|>{{ m.content }}",
        {"content": "hm", "args": {"<|im_end ": 1}},
    ),
    "hidden": ("{% if '+' not in m.content %}<|im_end|>{% endif %}{{ m.content }}", "+"),
}


@pytest.mark.parametrize("name", SPELLING)
def test_no_message_spells_a_special_token_by_its_template(name, tokenizer_folder):
    text, content = SPELLING[name]
    own = content if isinstance(content, dict) else {"content": content}
    body = (
        "{% if m.role == 'user' %}" + text + "{% else %}A:{{ m.content }}{{ eos_token }}{% endif %}"
    )
    tokenizer = Tokenizer.load(tokenizer_folder, "<|im_end|>")
    template = ChatTemplate("{% for m in messages %}" + body + "{% endfor %}", tokenizer, "it")
    answer = turn("assistant", "yes")
    # The same template takes what spells nothing.
    ids, _ = template.encode(
        [turn("user", "hm") | ({"name": "me"} if "name" in own else {}), answer]
    )
    assert ids.count(tokenizer.eod) == (2 if name == "hidden" else 1)
    with pytest.raises(UnusableChat, match=r"spells or hides <\|im_end\|>"):
        template.encode([{"role": "user", **own}, answer])
    if "".join(own) == "content":
        with config_error(r"--prompt .* spells or hides <\|im_end\|>"):
            template.prompt(own["content"])


TEMPLATES = {
    "no program": ("{% for x in %}", "must be a Jinja template .line 1"),
    "brackets": ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "cannot compile it: RecursionError"),
    "lists": ("{{" + "[" * 150 + "]" * 150 + "}}", "cannot compile it: RecursionError"),
    "too long": ("x" * 1_000_001, "must have at most 1000000 characters"),
    "refuses": (
        "{{ raise_exception('roles must alternate') }}",
        "refuses it: roles must alternate",
    ),
    "reaches out": ("{{ messages.__class__.__mro__ }}", "the template refuses it: access to attr"),
    "changes what was": (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "changes earlier messages",
    ),
    "begins answers otherwise": (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}think{% endif %}",
        "or what begins an answer, when",
    ),
    "within a token": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "an answer begins in the middle of a token",
    ),
    "without answers": ("{{ messages[0].content }}", "no token of an answer"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_cannot_be_used(name, make, tmp_path):
    text, message = TEMPLATES[name]
    file = tmp_path / "template.jinja"
    file.write_text(text)
    with config_error(message):
        make([{"messages": chat(2)}], template=file)


@pytest.fixture
def described(tokenizer_folder, tmp_path):
    """A tokenizer's folder with these settings; returns its template."""

    def of(**config):
        shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTemplate.find(tmp_path, Tokenizer.load(tmp_path), None)

    return of


def test_a_template_may_mark_answers_and_be_one_of_several(described, tmp_path):
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}"
    marked += "{% endgeneration %}{% endfor %}"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": marked}]
    template = described(eos_token={"content": "<|im_end|>"}, chat_template=several)
    messages = [turn("user", "a"), turn("assistant", "b")]
    assert template.render(messages) == "a<|im_end|>b<|im_end|>"
    assert template.text == marked
    ids, learnt = template.encode(messages)
    assert [Tokenizer.load(tmp_path).decode([i]) for i in np.array(ids)[learnt]] == [
        "b",
        "<|im_end|>",
    ]


def test_a_template_keeps_the_tokens_that_it_names(described, tmp_path):
    """Those of a tokenizer_config.json; a prepared folder and a checkpoint have none."""
    text = "\n{{ bos_token }}{{ eos_token }}{{ messages[0].content }}"
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "x"}
    template = described(**names, chat_template=text)
    alone = ChatTemplate(template.text, Tokenizer.load(tmp_path), "it")
    other = ChatTemplate.find(tmp_path, Tokenizer.load(tmp_path, "<|im_start|>"), None)
    for each in (template, alone, other):
        assert each.render([turn("user", "a")]) == "\n<|im_start|><|im_end|>a"


def test_prompt_is_a_message(folder):
    """The folder keeps its template, which a checkpoint takes along."""
    assert (folder / CHAT_TEMPLATE_FILE).read_text() == CHATML
    template = ChatTemplate.find(folder, Tokenizer.load(folder), None)
    assert template.prompt("hm") == "<|im_start|>user\nhm<|im_end|>\n<|im_start|>assistant\n"
    with config_error("spells the special token <.im_end.>"):
        template.prompt("hm<|im_end|>")


SETTINGS = {
    "--seq-length": ({"chat": False, "sequence_length": 64}, r"--seq-length \(64\) needs --chat"),
    "--template": (
        {"chat": False, "sequence_length": None, "template": Path("x")},
        r"--template \(x\) needs --chat",
    ),
    "length missing": ({"sequence_length": None}, r"--seq-length \(None\) must be at least 2"),
    "no tokenizer": ({"tokenizer": None}, "--chat needs --tokenizer"),
    "workers": ({"workers": 2}, r"--workers .2. cannot be combined with --chat"),
    "text key": ({"text_key": "chat"}, r"--text-key .chat. cannot be combined with --chat"),
    "no file": ({"template": Path("missing")}, r"--template \(missing\) cannot be read"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_options_that_do_not_fit(name, make):
    changes, message = SETTINGS[name]
    with config_error(message):
        make([{"messages": chat(2)}], **changes)


def test_sources_and_tokenizers_that_do_not_fit(tokenizer_folder, tmp_path):
    source = write(tmp_path / "chats.txt", [{"messages": chat(2)}])
    with config_error(r"chats.txt must be JSONL .* with --chat"):
        prepared(source, tokenizer_folder, tmp_path / "out")
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    with config_error("must have a chat template"):
        prepared(
            source.rename(tmp_path / "c.jsonl"), tmp_path, tmp_path / "out", eod_token="<|im_end|>"
        )


RUNS = {
    "documents": (
        {"data": {"reset_attention_mask": False}},
        "reset_attention_mask .false. must be",
    ),
    "loss": ({"data": {"eod_mask_loss": True}}, "data.eod_mask_loss .true. must be false with"),
    "template": (
        {"data": {"tokenizer": "elsewhere/tokenizer.json"}},
        "data.tokenizer .elsewhere/tokenizer.json. must be null with data.path",
    ),
    "length": ({"model": {"seq_length": 32}}, "model.seq_length .32. must be the --seq-length"),
    "capacity": (
        {"moe": VANILLA | {"capacity_factor": 1.0}},
        "moe.capacity_factor .1.0. must be null for vanilla layers",
    ),
    "parts of a sequence": (
        {"moe": VANILLA, "parallel": {"context_parallel_size": 2}},
        "parallel.context_parallel_size .2. must be 1 for vanilla layers",
    ),
}


@pytest.mark.parametrize("name", [None, *RUNS])
def test_runs_that_would_train_on_something_else(name, folder):
    raw = settings(
        model={"seq_length": LENGTH, "vocab_size": 304},
        data={"path": str(folder), "reset_attention_mask": True, "split": "4,1,0"},
    )
    if name is None:
        check_data(parse_config(raw))
        return
    for section, values in RUNS[name][0].items():
        raw[section] = raw.get(section, {}) | values
    with config_error(RUNS[name][1]):
        check_data(parse_config(raw))


def test_every_byte_is_verified(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    manifest = Manifest.read(copy)
    assert all(s.compared and not s.problem for s in verify(copy, manifest, lambda _: None))
    marks = bytearray((copy / "marks.bin").read_bytes())
    marks[3] ^= 1
    (copy / "marks.bin").write_bytes(marks)
    wrong = [s.name for s in verify(copy, manifest, lambda _: None) if s.problem]
    assert wrong == ["marks.bin"]
