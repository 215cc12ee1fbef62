"""Data: what a file may hold, what is refused and how, which tokens train, and that packing loses and mixes nothing."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from data import (
    IGNORE,
    PAD_ID,
    TEMPLATES,
    DataError,
    PackedBatches,
    Tokenizer,
    choose_template,
    encode_dialog,
    encode_documents,
    load_template,
    read_dialogs,
    write_dialog,
)
from helping.flags import parse_flags
from preparing.cache import TokenFile, cache_folder, write_tokens
from preparing.records import KINDS, copies, parse_input, read_records

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None

SHARED = Path(__file__).parents[2] / "shared" / "data"

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Where is it?"}
REPLY = {"role": "assistant", "content": "In Oakford."}
ASK_AGAIN = {"role": "user", "content": "And who?"}
REPLY_AGAIN = {"role": "assistant", "content": "Mira."}


def shared(name: str) -> Path:
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not beside the repository")
    return SHARED / name


@pytest.fixture
def llama2_tokenizer():
    return Tokenizer(shared("llama2_tokenizer.model"))


@pytest.fixture
def tiny_tokenizer():
    return Tokenizer(Path(__file__).parents[1] / "tiny" / "tokenizer.model")


@pytest.fixture
def write(tmp_path):
    """write(name, text or bytes) -> the path of the new file."""

    def write(name: str, content) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def pairs(*dialogs) -> list[tuple[str, str]]:
    """(prompt, reply) of dialogs of one turn, and proof that they are that."""
    assert all([m["role"] for m in dialog] == ["user", "assistant"] for dialog in dialogs)
    return [(dialog[0]["content"], dialog[1]["content"]) for dialog in dialogs]


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        list(read_dialogs(path, **options))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_begin_and_end_tokens_are_added_only_when_asked_for(tokenizer):
    ids = tokenizer.encode("Mira lives in Oakford.")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not {1, 2} & set(ids)
    assert tokenizer.encode("Mira lives in Oakford.", bos=True) == [1, *ids]
    assert tokenizer.encode("Mira lives in Oakford.", eos=True) == [*ids, 2]
    assert tokenizer.encode("", bos=True, eos=True) == [1, 2]


def test_special_tokens_written_in_text_stay_text(tokenizer):
    """A user who types </s> must not end the reply: the ids 1 and 2 never come out of text."""
    assert not {1, 2} & set(tokenizer.encode("<s> hello </s>"))


def test_an_unknown_character_becomes_its_bytes(tokenizer):
    ids = tokenizer.encode("🙂")
    assert tokenizer.pieces.id_to_piece(ids)[-4:] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    assert 0 not in ids  # never <unk>


@pytest.mark.parametrize(
    "text",
    ["words", "🙂👩‍👩‍👧 done", "a\tb\n\n\tc\n", "日本語と中文", "  two and two  ", "a\r\nb", "\0", "e\u0301 Å ﬁ", ""],
)
def test_text_comes_back_as_it_went_in(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_an_id_beyond_the_pieces_writes_nothing(tokenizer):
    """Many Hugging Face models have more rows than their tokenizer has pieces (a pad token, a round number), and may draw one."""
    assert tokenizer.decode([*tokenizer.encode("Mira"), tokenizer.vocab_size, 10**6]) == "Mira"


def test_a_tokenizer_that_is_missing_cut_short_or_something_else_is_a_data_error(tokenizer_file, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*absent.model"):
        Tokenizer(tmp_path / "absent.model")
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    whole = tokenizer_file.read_bytes()
    for name, content in {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello\n" * 50}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not a SentencePiece model, or it is cut short"):
            Tokenizer(tmp_path / name)


def test_llama_2_has_32000_pieces_and_its_ids_are_the_published_ones(llama2_tokenizer):
    assert (llama2_tokenizer.vocab_size, llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (32000, 1, 2)
    assert llama2_tokenizer.encode("[INST] Hi [/INST]", bos=True) == [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
    assert llama2_tokenizer.encode("🙂") == [29871, 243, 162, 156, 133]
    for text in ("🙂 日本", "\ta\n\n b  c\n", " Ünï"):
        assert llama2_tokenizer.decode(llama2_tokenizer.encode(text)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Templates. What trains is compared with the literal text, id by id.


def learned(ids, labels) -> list[int]:
    """The supervised ids; and every label is either the id at its place or -100."""
    assert len(ids) == len(labels)
    assert all(label in (i, IGNORE) for i, label in zip(ids, labels, strict=True))
    return [label for label in labels if label != IGNORE]


def test_llama2_trains_exactly_the_reply_and_its_end_token(tokenizer):
    ids, labels = encode_dialog([ASK, REPLY], tokenizer, TEMPLATES["llama2"])
    prompt = tokenizer.encode("[INST] Where is it? [/INST]", bos=True)
    reply = [*tokenizer.encode("In Oakford. "), 2]
    assert ids == prompt + reply
    assert labels == [IGNORE] * len(prompt) + reply


def test_llama2_writes_the_system_message_into_the_first_turn_and_begins_every_turn_anew(tokenizer):
    dialog = [SYSTEM, ASK, REPLY, ASK_AGAIN, REPLY_AGAIN]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES["llama2"])
    first = tokenizer.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is it? [/INST]")
    reply = tokenizer.encode("In Oakford. ")
    second = tokenizer.encode("[INST] And who? [/INST]")
    reply_again = tokenizer.encode("Mira. ")
    assert ids == [1, *first, *reply, 2, 1, *second, *reply_again, 2]
    assert learned(ids, labels) == [*reply, 2, *reply_again, 2]
    assert tokenizer.decode(ids) == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is it? [/INST] In Oakford.  [INST] And who? [/INST] Mira. "
    )


def test_llama2_ids_with_the_real_tokenizer_are_these(llama2_tokenizer):
    ids, labels = encode_dialog([SYSTEM, {**ASK, "content": "Where?"}, REPLY, ASK_AGAIN], llama2_tokenizer, TEMPLATES["llama2"])
    pieces = """<s> ▁[ INST ] ▁<< SY S >> <0x0A> Be ▁brief . <0x0A> < </ SY S >> <0x0A> <0x0A> Where ? ▁[ / INST ]
    ▁In ▁Oak ford . ▁ </s> <s> ▁[ INST ] ▁And ▁who ? ▁[ / INST ]""".split()
    assert llama2_tokenizer.pieces.id_to_piece(ids) == pieces
    assert llama2_tokenizer.pieces.id_to_piece(learned(ids, labels)) == "▁In ▁Oak ford . ▁ </s>".split()


def test_llama2_piece_by_piece_equals_tokenising_whole_turns_as_meta_does(llama2_tokenizer):
    """Meta encodes "[INST] question [/INST] answer " in one go. Spans stay known here because prompt and reply are encoded
    apart; on all of no_robots that gives the very same ids."""
    compared = 0
    for dialog in read_dialogs(shared("no_robots_test.jsonl")):
        texts, system = [m["content"].strip() for m in dialog if m["role"] != "system"], ""
        if dialog[0]["role"] == "system":
            system = f"<<SYS>>\n{dialog[0]['content'].strip()}\n<</SYS>>\n\n"
        whole = []
        for i in range(0, len(texts), 2):
            turn = f"[INST] {system if i == 0 else ''}{texts[i]} [/INST] {texts[i + 1]} "
            whole += llama2_tokenizer.encode(turn, bos=True, eos=True)
        assert encode_dialog(dialog, llama2_tokenizer, TEMPLATES["llama2"])[0] == whole
        compared += 1
    assert compared == 500


def test_white_space_around_a_message_is_neither_read_nor_learned(tokenizer):
    """146 of the 500 last replies in no_robots end in a stray space or newline, which a model would learn to write."""
    tidy = [{"role": "user", "content": "Where?", "input": "A map"}, {"role": "assistant", "content": "In Oakford."}]
    stray = [{"role": "user", "content": " Where?\n", "input": "\nA map "}, {"role": "assistant", "content": "\nIn Oakford. \n"}]
    for template in TEMPLATES.values():
        assert encode_dialog(stray, tokenizer, template) == encode_dialog(tidy, tokenizer, template)


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a town.\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a town.\n\n### Input:\nIt is near a river.\n\n### Response:"
)


@pytest.mark.parametrize(("extra", "text"), [({}, ALPACA), ({"input": "It is near a river."}, ALPACA_WITH_INPUT)])
def test_alpaca_writes_the_published_preamble_and_trains_the_reply(tokenizer, extra, text):
    dialog = [{"role": "user", "content": "Name a town.", **extra}, REPLY]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES["alpaca"])
    prompt, reply = tokenizer.encode(text, bos=True), tokenizer.encode("In Oakford.", eos=True)
    assert ids == prompt + reply
    assert labels == [IGNORE] * len(prompt) + reply
    assert tokenizer.decode(ids) == text + " In Oakford."


def test_alpaca_says_the_preamble_once_and_a_system_message_replaces_it(tokenizer):
    ids, labels = encode_dialog([ASK, REPLY, ASK_AGAIN, REPLY_AGAIN], tokenizer, TEMPLATES["alpaca"])
    reply, reply_again = tokenizer.encode("In Oakford."), tokenizer.encode("Mira.")
    second = tokenizer.encode("### Instruction:\nAnd who?\n\n### Response:")
    assert ids[-len(second + reply_again) - 1 :] == [*second, *reply_again, 2]
    assert learned(ids, labels) == [*reply, 2, *reply_again, 2]
    ids, _ = encode_dialog([SYSTEM, ASK], tokenizer, TEMPLATES["alpaca"])
    assert ids == tokenizer.encode("Be brief.\n\n### Instruction:\nWhere is it?\n\n### Response:", bos=True)


def test_plain_adds_nothing_but_begin_and_end(tokenizer):
    ids, labels = encode_dialog([SYSTEM, ASK, REPLY], tokenizer, TEMPLATES["plain"])
    prompt, reply = tokenizer.encode("Be brief.\n\nWhere is it?", bos=True), tokenizer.encode("In Oakford.", eos=True)
    assert ids == prompt + reply
    assert learned(ids, labels) == reply


LITERAL = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhere is it? [/INST]| In Oakford. </s>|<s>[INST] And who? [/INST]| Mira. </s>"
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nWhere is it?\n\n### Response:| In Oakford.</s>|"
        " ### Instruction:\nAnd who?\n\n### Response:| Mira.</s>"
    ),
    "plain": "<s>Be brief.\n\nWhere is it?| In Oakford.</s>| And who?| Mira.</s>",
    "human_bot": "<s>Be brief.\n\n<human>: Where is it?\n<bot>:| In Oakford.\n</s>| <human>: And who?\n<bot>:| Mira.\n</s>",
    "guanaco": (
        "<s>Be brief.\n\n### Human: Where is it?### Assistant:| In Oakford.</s>| ### Human: And who?### Assistant:| Mira.</s>"
    ),
    "functions": (
        "<s><FUNCTIONS>Be brief.</FUNCTIONS>\n\n[INST] Where is it? [/INST]\n\n| In Oakford.</s>|"
        " [INST] And who? [/INST]\n\n| Mira.</s>"
    ),
}


def spelled(ids, tokenizer) -> str:
    """The text of ids with <s> and </s> written out, and SentencePiece's leading space kept where it is not behind <s>."""
    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    pieces = b"".join(
        names[i].encode() if i in names else bytes([int(piece[3:-1], 16)]) if piece.startswith("<0x") else piece.encode()
        for i, piece in zip(ids, tokenizer.pieces.id_to_piece(ids), strict=True)
    )
    return pieces.decode().replace("▁", " ").replace("<s> ", "<s>")


@pytest.mark.parametrize("which", ["tokenizer", "tiny_tokenizer", "llama2_tokenizer"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_written_literally_so(template, which, request):
    """The text with its begin and end tokens; | where what is read and what is learned meet."""
    tokenizer = request.getfixturevalue(which)
    dialog = [SYSTEM, ASK, REPLY, ASK_AGAIN, REPLY_AGAIN]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES[template])
    learning = [label != IGNORE for label in labels]
    cuts = [0, *(i for i in range(1, len(ids)) if learning[i] != learning[i - 1]), len(ids)]
    assert "|".join(spelled(ids[a:b], tokenizer) for a, b in pairwise(cuts)) == LITERAL[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_begin_is_written_once_and_end_after_every_reply(tokenizer, template):
    """Two <s> in a row, or none, is a complaint that every big library has had. Meta writes one at every turn, and only there."""
    dialog = [SYSTEM, *[ASK, REPLY] * 4]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES[template])
    begins = [i for i, token in enumerate(ids) if token == 1]
    ends = [i for i, token in enumerate(ids) if token == 2]
    assert begins == ([0, *(i + 1 for i in ends[:-1])] if template == "llama2" else [0])
    assert len(ends) == 4 and all(labels[i] == 2 for i in ends) and all(labels[i] == IGNORE for i in begins)


def test_functions_are_asked_for_as_their_dataset_writes_them(tokenizer, write):
    record = {"functionList": '{"name": "f"}', "userPrompt": "Call it.", "assistantResponse": '{"function": "f"}'}
    (found,) = read_records(write("a.jsonl", json.dumps(record)))
    assert found.kind == "functions"
    (prompt, reply) = write_dialog(found.dialog, TEMPLATES["functions"])
    assert prompt.text == '<FUNCTIONS>{"name": "f"}</FUNCTIONS>\n\n[INST] Call it. [/INST]\n\n'
    assert reply.text == '{"function": "f"}'


OWN = {"user": "Q: {system}{user}\nA:", "assistant": "{assistant}\n", "stop": ["Q:"]}


def test_a_template_of_ones_own_is_used_from_its_file_and_from_what_the_run_keeps(tokenizer, write):
    path = str(write("mine.json", json.dumps(OWN)))
    template, kept = load_template(path)
    assert [p.text for p in write_dialog([SYSTEM, ASK, REPLY], template)] == ["Q: Be brief.\n\nWhere is it?\nA:", "In Oakford.\n"]
    os.remove(path)
    assert load_template(kept) == (template, kept) and template.stop == ("Q:",)
    with_input = [{**ASK, "input": "a map"}, REPLY]
    assert write_dialog(with_input, template)[0].text == "Q: Where is it?\n\na map\nA:"
    old = json.dumps(OWN | {"assistant": "{assistant} </s>"})  # refused in a file, but of a run that was trained so a part
    assert load_template(old)[1] == old


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "Q: {usr}"}, "'user' should hold {user} once, other braces written twice, not 'Q: {usr}'"),
        ({"user": "{user} {user}"}, "should hold {user} once"),
        ({"user": "{system}{user}{system}"}, "should hold {user} once"),
        ({"user": "{user!r}"}, "should hold {user} once"),
        ({"user": "{user.__class__}"}, "should hold {user} once"),
        ({"user": "{} {user}"}, "should hold {user} once"),
        ({"user": "{ {user}"}, "other braces written twice"),
        ({"assistant": "yes"}, "'assistant' should hold {assistant} once"),
        ({"assistant": 3}, "'assistant' should hold {assistant} once"),
        ({"user_with_input": "{user}"}, "'user_with_input' should hold {user} and {input} once"),
        ({"user": "Q: {user}", "system": "{system}"}, "a system message would be lost"),
        ({"assistant": "\ud83d{assistant}"}, "holds half a character, '\\ud83d'"),
        ({"stop": ["\ud83d"]}, "holds half a character, '\\ud83d'"),
        ({"assistant": "{assistant} </s>"}, "leave out <s> and </s>: they are added where they belong"),
        ({"stop": "Q:"}, "'stop' should be a list"),
        ({"stop": [""]}, "'stop' should be a list of strings that are not empty"),
        ({"eos": "</s>"}, "a template holds user, assistant and perhaps"),
    ],
)
def test_a_template_that_would_write_something_else_is_refused(write, change, reason):
    path = str(write("mine.json", json.dumps(OWN | change)))
    with pytest.raises(DataError) as error:
        load_template(path)
    assert str(error.value).startswith(path) and reason in str(error.value)


@pytest.mark.parametrize("extra", ["", "a map"])
def test_a_system_message_that_a_template_has_no_place_for_is_refused_and_not_lost(tokenizer, extra):
    own = {"user": "{user}:", "assistant": "{assistant}"} if not extra else OWN | {"user_with_input": "{user} {input}"}
    template, asked = load_template(json.dumps(own))[0], [{**ASK, "input": extra}, REPLY]
    encode_dialog(asked, tokenizer, template)
    encode_dialog([{**SYSTEM, "content": " "}, *asked], tokenizer, template)
    with pytest.raises(DataError, match=r"has no \{system\} where this system message would stand: 'Be brief\.'$"):
        encode_dialog([SYSTEM, *asked], tokenizer, template)


def test_a_template_that_is_no_json_or_not_there_is_refused(write, tmp_path):
    for name, reason in ((str(write("a.json", "{")), "is not JSON"), (str(tmp_path / "b.json"), "cannot be read: No such file")):
        with pytest.raises(DataError, match=reason):
            load_template(name)


def test_the_template_follows_the_records_fields_unless_one_is_asked_for():
    name = {kinds: choose_template(kinds, None)[1] for kinds in [("text",), (), ("alpaca", "text"), ("guanaco",), ("a", "b")]}
    assert name == {("text",): "plain", (): "plain", ("alpaca", "text"): "alpaca", ("guanaco",): "guanaco", ("a", "b"): "llama2"}
    assert choose_template(("alpaca",), "plain")[:2] == (TEMPLATES["plain"], "plain")


MARKERS = "[/INST] [INST] <s> </s> <<SYS>> <bot>: <human>: ### Assistant: ### Human: ### Response: <unk> <0x0A> {user} ▁".split()
forged = [marker for marker in MARKERS if marker != "▁"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_markers_in_a_message_move_no_border_and_make_no_control_token(tokenizer, template):
    """The control: tokenised as one text and searched for "[/INST]", as is often done, the border would be the user's own."""
    evil = " ".join(forged)
    ids, labels = encode_dialog([{**ASK, "content": evil}, {**REPLY, "content": evil}], tokenizer, TEMPLATES[template])
    reply = tokenizer.encode(TEMPLATES[template].assistant.format(assistant=evil), eos=True)
    assert learned(ids, labels) == reply and labels[-len(reply) :] == reply
    assert (ids.count(1), ids.count(2), ids.count(0)) == (1, 1, 0)
    text = tokenizer.decode(ids)
    assert text.index("[/INST]") < len(tokenizer.decode(ids[: -len(reply)]))  # what a search would have found


if given:
    words = st.one_of(st.text(), st.sampled_from(MARKERS), st.text(alphabet=st.characters(codec="utf-8")))
    contents = st.lists(words, max_size=6).map("".join).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
    turns = st.tuples(contents, contents)

    @pytest.mark.live
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(st.lists(turns, min_size=1, max_size=4), st.one_of(st.none(), contents), st.booleans(), st.sampled_from([*TEMPLATES]))
    def test_whatever_a_dialog_says_exactly_its_replies_are_learned(tokenizer, dialog, system, answered, name):
        template = TEMPLATES[name]
        messages = [] if system is None else [{"role": "system", "content": system}]
        for ask, reply in dialog:
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
        messages = messages if answered else messages[:-1]
        ids, labels = encode_dialog(messages, tokenizer, template)
        replies = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert learned(ids, labels) == [
            token for reply in replies for token in tokenizer.encode(template.assistant.format(assistant=reply), eos=True)
        ]
        assert ids.count(2) == len(replies) and ids[0] == 1
        assert ids.count(1) == (len(dialog) if template.bos_every_turn else 1)
        assert 0 not in ids
        documents, fates = encode_documents([messages], tokenizer, template, max_length=10**6)
        assert fates == ({"kept": 1} if any(replies) else {"dropped, no reply": 1})
        for document, _ in documents:  # the batch call writes the same ids as the single one; an unanswered turn is left off
            assert document.tolist() == ids[: len(document)]

    @pytest.mark.live
    @settings(max_examples=150, deadline=None)
    @given(st.lists(turns, min_size=1, max_size=3))
    def test_a_dialog_written_as_jsonl_is_read_as_it_was(tmp_path_factory, dialog):
        messages = [m for a, b in dialog for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})]
        path = tmp_path_factory.mktemp("a") / "a.jsonl"
        path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
        assert list(read_dialogs(path)) == [messages]


@pytest.mark.parametrize("template", TEMPLATES)
def test_raw_text_trains_every_token_whatever_the_template(tokenizer, template):
    ids, labels = encode_dialog([{"role": "text", "content": "Mira mends clocks."}], tokenizer, TEMPLATES[template])
    assert ids == labels == tokenizer.encode("Mira mends clocks.", bos=True, eos=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_reply_trains_with_its_end_token_and_nothing_else_does(tokenizer, template):
    ids, labels = encode_dialog([SYSTEM, ASK, REPLY, ASK_AGAIN, REPLY_AGAIN], tokenizer, TEMPLATES[template])
    written = [TEMPLATES[template].assistant.format(assistant=m["content"]) for m in (REPLY, REPLY_AGAIN)]
    assert learned(ids, labels) == [*tokenizer.encode(written[0]), 2, *tokenizer.encode(written[1]), 2]


def test_a_turn_of_a_million_letters_is_read_and_cut_like_any_other(tokenizer):
    dialog = [{**ASK, "content": "ferry " * 20_000}, {**REPLY, "content": "lamp 日本 " * 100_000}]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES["llama2"])
    assert learned(ids, labels) == tokenizer.encode(dialog[1]["content"].strip() + " ", eos=True)
    ((cut, _),), fates = encode_documents([dialog], tokenizer, TEMPLATES["llama2"], max_length=len(ids) - 5)
    assert cut.tolist() == ids[:-5] and fates["kept"] == 1


@pytest.mark.parametrize("template", TEMPLATES)
def test_train_on_inputs_trains_the_prompt_as_well(tokenizer, template):
    dialog = [SYSTEM, ASK, REPLY]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES[template], train_on_inputs=True)
    assert labels == ids == encode_dialog(dialog, tokenizer, TEMPLATES[template])[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_of_generation_is_the_beginning_of_the_training_ids(tokenizer, template):
    """A prompt at inference that is not the one trained is what users of the big libraries complain of most."""
    dialog = [SYSTEM, ASK, REPLY, ASK_AGAIN, REPLY_AGAIN]
    ids, labels = encode_dialog(dialog, tokenizer, TEMPLATES[template])
    prompt, nothing = encode_dialog(dialog[:-1], tokenizer, TEMPLATES[template])
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == nothing
    assert labels[len(prompt) :] == ids[len(prompt) :]  # and what follows is all reply


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_in_a_message_are_only_braces(tokenizer, template):
    odd = "{system} {} {0} {user!r} %s {{x}}"
    dialog = [{"role": "system", "content": odd}, {"role": "user", "content": odd, "input": odd}, {**REPLY, "content": odd}]
    ids, _ = encode_dialog(dialog, tokenizer, TEMPLATES[template])
    assert tokenizer.decode(ids).count(odd) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Records that are right


def test_messages_are_read_as_they_are(write):
    dialog = [SYSTEM, ASK, REPLY, ASK_AGAIN]
    record = {"prompt": "ignored", "prompt_id": "7", "messages": dialog, "category": "Chat"}  # no_robots
    path = write("a.jsonl", json.dumps(record) + "\n" + json.dumps({"messages": [ASK, REPLY]}))
    assert list(read_dialogs(path)) == [dialog, [ASK, REPLY]]


SCHEMAS = [
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, [("Add.", "3")], {"input": "1 and 2"}),
    ({"instruction": "Hi", "input": "", "output": "Hello", "data_source": "x"}, [("Hi", "Hello")], {}),
    ({"instruction": "Hi", "output": "Hello"}, [("Hi", "Hello")], {}),
    ({"prompt": "Hi", "response": "Hello"}, [("Hi", "Hello")], {}),
]


@pytest.mark.parametrize(("record", "expected", "more"), SCHEMAS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_every_schema_is_recognised_in_every_kind_of_file(write, record, expected, more, kind):
    content = {
        "jsonl": json.dumps(record),
        "json": json.dumps([record], indent=2),
        "csv": ",".join(record) + "\n" + ",".join(record.values()) + "\n",
    }[kind]
    (dialog,) = read_dialogs(write(f"a.{kind}", content))
    assert pairs(dialog) == expected
    assert {name: text for name, text in dialog[0].items() if name not in ("role", "content")} == more


def turn(*contents: str) -> list[dict]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


BRIEF = [{"role": "system", "content": "Be brief."}]
NAMED = {  # name in REFERENCE's table: a record, the dialog it is, and the template that is chosen for it
    "no_robots": (
        {"prompt": "x", "prompt_id": "1", "messages": turn("Hi", "Yo"), "category": "Chat"},
        turn("Hi", "Yo"),
        "llama2",
    ),
    "openchat_sharegpt4": (
        {"items": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        turn("Hi", "Yo"),
        "llama2",
    ),
    "sharegpt": (
        {"conversations": [{"from": role, "value": role} for role in ("system", "human", "gpt")]},
        [{"role": "system", "content": "system"}, *turn("human", "gpt")],
        "llama2",
    ),
    "guanaco": ({"text": "### Human: Hi### Assistant: Yo### Human: Bye"}, turn("Hi", "Yo", "Bye"), "guanaco"),
    "oig": (
        {"input": "<human>: Hi\nthere\n<bot>: I am <bot>: you\n<human>:", "prompt_type": "plain", "source": "s", "id": 1},
        turn("Hi\nthere", "I am <bot>: you"),
        "human_bot",
    ),
    "platypus": ({"instruction": "Hi", "input": "", "output": "Yo", "data_source": "s"}, turn("Hi", "Yo"), "alpaca"),
    "openorca": ({"id": 1, "system_prompt": "Be brief.", "question": "Hi", "response": "Yo"}, BRIEF + turn("Hi", "Yo"), "llama2"),
    "openorca, no system": ({"id": 1, "system_prompt": "", "question": "Hi", "response": "Yo"}, turn("Hi", "Yo"), "llama2"),
    "open-instruct": ({"alpaca_prompt": "A: Hi", "response": "Yo", "instruction": "Hi"}, turn("A: Hi", "Yo"), "plain"),
    "functions": (
        {"functionList": "Be brief.", "userPrompt": "Hi", "assistantResponse": "Yo"},
        BRIEF + turn("Hi", "Yo"),
        "functions",
    ),
    "functions 2": (
        {"systemPrompt": "Be brief.", "userPrompt": "Hi", "assistantResponse": "Yo"},
        BRIEF + turn("Hi", "Yo"),
        "functions",
    ),
    "webglm-qa": (
        {"question": "Hi", "answer": "Yo[1]", "references": ["a", "b"]},
        [{"role": "user", "content": "Hi", "input": "[1] a\n\n[2] b"}, {"role": "assistant", "content": "Yo[1]"}],
        "alpaca",
    ),
    "seed tasks": (
        {"id": "1", "instruction": "Hi", "instances": [{"input": "x", "output": "Yo"}]},
        [{"role": "user", "content": "Hi", "input": "x"}, {"role": "assistant", "content": "Yo"}],
        "alpaca",
    ),
    "conversations of roles": ({"conversations": turn("Hi", "Yo"), "system": "Be brief."}, BRIEF + turn("Hi", "Yo"), "llama2"),
    "a system message beside": ({"system": "Be brief.", "messages": BRIEF + turn("Hi")}, BRIEF + turn("Hi"), "llama2"),
    "a system message before a pair": (
        {"system": "Be brief.", "instruction": "Hi", "output": "Yo"},
        BRIEF + turn("Hi", "Yo"),
        "alpaca",
    ),
    "written for Llama 2": (
        {"text": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo </s><s>[INST] Bye\n[/INST]Take care.</s>"},
        BRIEF + turn("Hi", "Yo", "Bye", "Take care."),
        "llama2",
    ),
    "text that speaks of Llama 2": (
        {"text": "Write [INST] Hi [/INST]."},
        [{"role": "text", "content": "Write [INST] Hi [/INST]."}],
        "text",
    ),
    "text": ({"text": "Once. ### Human: said it."}, [{"role": "text", "content": "Once. ### Human: said it."}], "text"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.live] if kind == "parquet" else [])
        for name, (record, _, _) in NAMED.items()
        for kind in ("jsonl", "json", "jsonl.gz", "csv", "parquet")
        if kind != "csv" or not any(isinstance(value, list) for value in record.values())  # a CSV field holds text only
    ],
)
def test_every_dataset_of_the_table_is_read_from_every_kind_of_file(write, tmp_path, name, kind):
    record, dialog, template = NAMED[name]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        import csv

        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([list(record), list(record.values())])
    elif kind == "parquet":
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist([record]), path)
    else:
        text = json.dumps([record] if kind == "json" else record)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    (found,) = read_records(path)
    assert (found.dialog, found.kind) == (dialog, template)


def test_dolphins_instruction_is_a_system_message_where_the_flags_say_so(write):
    path = write("a.jsonl", json.dumps({"instruction": "Be brief.", "input": "Hi", "output": "Yo"}))
    assert list(read_dialogs(path, source="input", target="output", system="instruction")) == [BRIEF + turn("Hi", "Yo")]
    assert "give these too" in refusal(path, system="instruction")


def test_a_name_of_a_dataset_says_what_to_download_from_where_and_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"download data/train-\*.parquet from https://huggingface.co/datasets/HuggingFaceH4/no_rob"
    ):
        parse_input("no_robots")
    with pytest.raises(DataError, match="--data FILE --system instruction --source input --target output"):
        parse_input("dolphin:2")
    (tmp_path / "no_robots.csv").write_text("")
    assert parse_input("no_robots.csv") == (Path("no_robots.csv"), 1)


def test_every_kind_of_record_has_its_template_and_every_template_a_kind():
    assert {*TEMPLATES} == KINDS


def test_weights_are_read_and_give_that_many_copies_on_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "C:a.jsonl", "b:2.jsonl"):
        (tmp_path / name).write_text("")
    assert parse_input("a.jsonl:2") == (Path("a.jsonl"), 2) and parse_input("a.jsonl:0.25") == (Path("a.jsonl"), 0.25)
    assert parse_input("C:a.jsonl") == (Path("C:a.jsonl"), 1) and parse_input("b:2.jsonl") == (Path("b:2.jsonl"), 1)
    with pytest.raises(DataError, match=r"absent.jsonl cannot be read: No such file"):
        parse_input("absent.jsonl")
    with pytest.raises(DataError, match=r"a.xlsx: unknown kind of file"):
        parse_input("a.xlsx:2")
    for weight in ("0", "1000001", "9" * 99):
        with pytest.raises(DataError, match="a weight is above 0 and at most 1,000,000"):
            parse_input(f"a.jsonl:{weight}")
    assert {copies(2, i, 0) for i in range(50)} == {2}
    seen = [copies(1.5, i, 0) for i in range(1000)]
    assert set(seen) == {1, 2} and 1450 < sum(seen) < 1550 and seen == [copies(1.5, i, 0) for i in range(1000)]
    assert seen != [copies(1.5, i, 1) for i in range(1000)]


@pytest.mark.parametrize(
    ("kind", "taken"), [("alpaca", "alpaca"), ("a field of somebody's own", "llama2"), (["alpaca"], "llama2")]
)
def test_a_kind_that_is_no_templates_name_is_no_kind(write, kind, taken):
    path = write("a.jsonl", json.dumps({"messages": [ASK, REPLY], "kind": kind}))
    assert [record.kind for record in read_records(path)] == [taken]


def test_parquet_and_jsonl_of_no_robots_are_the_same_dialogs():
    pytest.importorskip("pyarrow")
    assert list(read_dialogs(shared("no_robots_test.parquet"))) == list(read_dialogs(shared("no_robots_test.jsonl")))


def test_the_seed_tasks_are_read():
    records = list(read_records(shared("alpaca_seed_tasks.jsonl")))
    assert len(records) == 175 and {record.kind for record in records} == {"alpaca"}


@pytest.mark.parametrize("nothing", [0, False, [], {}])
def test_an_input_or_system_message_that_is_no_text_is_refused_and_not_left_out(write, nothing):
    """A number is text in the record beside it: 5 was refused and 0 was lost."""
    record = json.dumps({"instruction": "Square it.", "input": nothing, "output": "0"})
    assert "field 'input' should hold text and holds" in refusal(write("a.jsonl", record))
    record = json.dumps({"question": "Who?", "response": "Mira.", "system_prompt": nothing})
    assert "field 'system_prompt' should hold text and holds" in refusal(write("b.jsonl", record))
    record = json.dumps({"q": "Who?", "a": "Mira.", "s": nothing})
    assert "field 's' should hold text and holds" in refusal(write("c.jsonl", record), source="q", target="a", system="s")


def test_an_input_of_null_is_no_input(write):
    (dialog,) = read_dialogs(write("a.jsonl", '{"instruction": "Hi", "input": null, "output": "Hello"}'))
    assert dialog == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_record_of_text_is_raw_text(write, kind):
    content = {"jsonl": '{"text": "Once."}', "json": '[{"text": "Once."}]', "csv": "text\nOnce.\n"}[kind]
    assert list(read_dialogs(write(f"a.{kind}", content))) == [[{"role": "text", "content": "Once."}]]


def test_a_text_file_is_a_document_a_paragraph(write):
    path = write("a.txt", "\n\nOne line,\nand another.\n\n   \nSecond 日本.\n\n\nThird")
    assert [d[0] for d in read_dialogs(path)] == [
        {"role": "text", "content": text} for text in ("One line,\nand another.", "Second 日本.", "Third")
    ]
    assert [record.origin for record in read_records(path)] == [f"a.txt, line {number}" for number in (3, 7, 10)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_source_and_target_name_any_two_columns(write, kind):
    record = {"alpaca_prompt": "Hi", "A: b, c?": "Hello", "prompt": "no", "response": "no"}
    content = {
        "jsonl": json.dumps(record),
        "json": json.dumps([record]),
        "csv": 'alpaca_prompt,"A: b, c?",prompt,response\nHi,Hello,no,no\n',
    }[kind]
    dialogs = list(read_dialogs(write(f"a.{kind}", content), source="alpaca_prompt", target="A: b, c?"))
    assert pairs(*dialogs) == [("Hi", "Hello")]


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_change_nothing(write):
    """Files saved by Windows' editors: the mark is no part of the first name, and no carriage return is trained on."""
    bom = b"\xef\xbb\xbf"
    hi, bye = b'{"prompt": "Hi", "response": "Hello"}', b'{"prompt": "Bye", "response": "So long"}'
    jsonl = write("a.jsonl", bom + b"\r\n" + hi + b"\r\n\r\n  \r\n" + bye + b"\r\n")
    csv = write("a.csv", bom + b"prompt,response\r\nHi,Hello\r\n\r\nBye,So long\r\n")
    listed = write("a.json", bom + b"[" + hi + b",\r\n" + bye + b"]\r\n")
    for path in (jsonl, csv, listed):
        assert pairs(*read_dialogs(path)) == [("Hi", "Hello"), ("Bye", "So long")]
    txt = write("a.txt", bom + b"One line,\r\nand another.\r\n\r\nSecond.\r\n")
    assert [d[0]["content"] for d in read_dialogs(txt)] == ["One line,\nand another.", "Second."]


def test_a_quoted_csv_field_may_hold_newlines_commas_and_quotes(write):
    path = write("a.csv", b'prompt,response\r\n"Two\r\nlines, and a ""word""",Yes\r\n"\n\nx",No\r\n')
    assert pairs(*read_dialogs(path)) == [('Two\nlines, and a "word"', "Yes"), ("\n\nx", "No")]


def test_a_csv_field_may_be_longer_than_csvs_own_limit(write):
    path = write("a.csv", "prompt,response\nHi," + "x" * 200_000 + "\n")
    assert len(next(iter(read_dialogs(path)))[1]["content"]) == 200_000


def test_line_separators_of_unicode_do_not_cut_a_json_line(write):
    path = write("a.jsonl", '{"prompt": "a\u2028b\u0085c", "response": "d"}\n')
    assert pairs(*read_dialogs(path)) == [("a\u2028b\u0085c", "d")]


def test_the_whole_of_no_robots_is_read():
    dialogs = list(read_dialogs(shared("no_robots_test.jsonl")))
    assert len(dialogs) == 500
    assert all(dialog[-1]["role"] == "assistant" for dialog in dialogs)
    assert {m["role"] for dialog in dialogs for m in dialog} == {"system", "user", "assistant"}


# ---------------------------------------------------------------------------------------------------------------------
# Records that are not: the message names the file, the line and the reason

GOOD = '{"prompt": "Hi", "response": "Hello"}\n'


def test_broken_json_is_named_with_its_line_and_the_records_before_it_are_fine(write):
    path = write("a.jsonl", GOOD * 316 + '{"prompt": "Hi", "response": \n' + GOOD * 3)
    message = refusal(path)
    assert message.startswith(f"{path}, line 317: not JSON: ")
    reader, read = read_dialogs(path), 0
    with pytest.raises(DataError):
        for _ in reader:
            read += 1
    assert read == 316


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("[1, 2]", "expected a record with named fields, found list"),
        ("null", "expected a record with named fields, found NoneType"),
        ('{"prompt": "Hi", "response": 3}', "field 'response' should hold text and holds int; fields here: prompt, response"),
        ('{"prompt": null, "response": "x"}', "field 'prompt' should hold text and holds nothing"),
        ('{"instruction": "Hi", "output": ["x"]}', "field 'output' should hold text and holds list"),
        ('{"instruction": "Hi", "input": {"a": 1}, "output": "x"}', "field 'input' should hold text and holds dict"),
        ('{"text": 1.5}', "field 'text' should hold text and holds float"),
        ('{"instruction": "Hi"}', "no known fields among instruction: known are messages; instruction, input, output"),
        ("{}", "no known fields among (none)"),
        ('{"messages": "Hi"}', "field 'messages' should hold a list of messages and does not"),
        ('{"messages": []}', "field 'messages' should hold a list of messages and does not"),
        ('{"messages": ["Hi"]}', "message 1 has the role None, expected system or user"),
        ('{"messages": [{"role": "user"}]}', "message 1 should hold text in 'content' and holds NoneType"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 should hold text in 'content' and holds NoneType"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "message 1 has the role 'assistant', expected system or user"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "a system message alone is no conversation"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "message 1 has the role 'tool', expected system or user"),
        ('{"prompt": "cut \\ud83d", "response": "x"}', "holds half a character, '\\ud83d'"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "holds half a character, '\\udc00'"),
    ],
)
def test_a_malformed_record_is_refused_with_its_place_and_reason(write, record, reason):
    path = write("a.jsonl", GOOD + record)
    assert refusal(path).startswith(f"{path}, line 2: {reason}")
    path = write("a.json", f"[{GOOD}, {record}]")
    assert refusal(path).startswith(f"{path}, record 2: {reason}")


@pytest.mark.parametrize(
    ("roles", "bad", "expected"),
    [
        (["user", "user"], 2, "assistant"),
        (["user", "assistant", "assistant"], 3, "user"),
        (["system", "assistant"], 2, "user"),
        (["user", "assistant", "system"], 3, "user"),
        (["system", "system"], 2, "user"),
    ],
)
def test_roles_out_of_order_are_refused_with_the_message_that_is_wrong(write, roles, bad, expected):
    path = write("a.jsonl", json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}))
    assert refusal(path) == f"{path}, line 1: message {bad} has the role {roles[bad - 1]!r}, expected {expected}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(write, kind):
    first = {"jsonl": GOOD, "json": "[\n", "csv": "prompt,response\n", "txt": "One\n"}[kind].encode()
    path = write(f"a.{kind}", first + b"caf\xe9 au lait\n")
    assert refusal(path) == f"{path}, line 2: not UTF-8 text (invalid continuation byte at byte 3)"


@pytest.mark.parametrize("row", ["Hi", "Hi,Hello,more"])
def test_a_csv_row_that_is_too_short_or_too_long_is_refused_with_its_line(write, row):
    path = write("a.csv", f"prompt,response\nHi,Hello\n{row}\nHi,Hello\n")
    assert refusal(path) == f"{path}, line 3: expected 2 columns (prompt, response)"


def test_a_csv_with_two_columns_of_one_name_or_with_none_is_refused(write):
    """csv takes the last column of a name, and says nothing of the others. A nameless one, as pandas' index, is nobody's."""
    two = write("a.csv", "prompt,response,response\nHi,Yes,No\n")
    assert refusal(two) == f"{two}, line 1: two columns are named 'response', and only one of them would be read"
    none = write("b.csv", "\nprompt,response\nHi,Yes\n")
    assert refusal(none) == f"{none}, line 1: expected the names of the columns, found none"
    assert pairs(*read_dialogs(write("c.csv", ",prompt,response,\n0,Hi,Yes,1\n"))) == [("Hi", "Yes")]


def test_a_quote_that_never_closes_is_refused_where_it_opens(write):
    """An open quote swallows the rest of the file; the last line's number would help nobody find it."""
    path = write("a.csv", 'prompt,response\nHi,Hello\n"Hi,Hello\n' + "Hi,Hello\n" * 100)
    assert refusal(path).startswith(f"{path}, the record from line 3: not CSV: ")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_file_without_a_record_is_refused(write, kind):
    empty = {"jsonl": " \n\n", "json": "[]", "csv": "prompt,response\n", "txt": "\n \n"}[kind]
    path = write(f"a.{kind}", empty)
    assert refusal(path) == f"{path} holds no record"
    assert str(path) in refusal(write(f"b.{kind}", "").rename(path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_missing_file_and_a_folder_in_its_place_are_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    assert refusal(path) == f"{path} cannot be read: No such file or directory"
    path.mkdir()
    assert refusal(path) == f"{path} is a folder: name the files in it"


def test_an_unknown_ending_is_refused_with_the_known_ones(write):
    assert refusal(write("a.xlsx", "x")).endswith(
        "kind of file '.xlsx': known are .jsonl, .json, .csv, .txt, .parquet, and .gz of the text ones"
    )
    assert "'(no ending)'" in refusal(write("a", "x"))


def test_a_json_file_must_be_a_list(write):
    path = write("a.json", GOOD)
    assert refusal(path) == f"{path}: expected a list of records, found dict"
    assert refusal(write("a.json", GOOD * 2)).startswith(f"{path} is not JSON: Extra data: line 2")  # JSONL under a wrong name


def test_source_without_target_and_a_column_that_is_not_there_are_refused(write):
    path = write("a.jsonl", GOOD)
    assert "give both or neither" in refusal(path, source="prompt")
    assert "give both or neither" in refusal(path, target="response")
    message = refusal(path, source="question", target="response")
    assert message == f"{path}, line 1: there is no field 'question'; fields here: prompt, response"


@pytest.mark.parametrize("row", ["Hi;Yes", "1,5;2,5"])
@pytest.mark.parametrize("more", [{}, {"source": "prompt", "target": "response"}])
def test_a_csv_of_semicolons_as_excel_writes_it_is_refused_with_that_reason(write, row, more):
    path = write("a.csv", f"\ufeffprompt;response\r\n{row}\r\n")
    assert refusal(path, **more) == f"{path}, line 1: one column, named 'prompt;response': are its columns parted by commas?"


@pytest.mark.parametrize("text", [f"[{GOOD}]", f"[\n{GOOD}\n]\n"])
def test_a_list_named_jsonl_and_lines_named_json_are_refused_with_the_name_they_should_have(write, text):
    assert refusal(write("a.jsonl", text)).endswith(
        "line 1: begins a list; if the file is one list of records, it should be called .json"
    )
    assert refusal(write("a.json", GOOD * 2)).endswith("if it holds a record a line, it should be called .jsonl")


REPLIED = {"role": "assistant", "content": "Let me look.", "tool_calls": None, "function_call": None, "weight": 1}
CALLS = [{"function": {"name": "weather"}}]


@pytest.mark.parametrize(
    "reply, reason",
    [
        (REPLIED | {"tool_calls": CALLS}, "message 2 calls a tool, which no template writes"),
        (REPLIED | {"content": None, "tool_calls": CALLS}, "message 2 calls a tool, which no template writes"),
        (REPLIED | {"content": "", "function_call": CALLS[0]}, "message 2 calls a tool, which no template writes"),
        (REPLIED | {"weight": 0}, "message 2 has weight 0, and here every reply"),
        ({"from": "gpt", "value": "No!", "weight": 0.0}, "message 2 has weight 0, and here every reply"),
    ],
)
def test_a_reply_that_would_lose_its_call_of_a_tool_or_is_not_to_be_learned_is_refused(write, reply, reason):
    asked = {"role": "user", "content": "Rain?", "weight": 0}
    path = write("a.jsonl", json.dumps({"conversations" if "from" in reply else "messages": [asked, reply]}))
    assert refusal(path).startswith(f"{path}, line 1: {reason}")
    assert len(list(read_dialogs(write("a.jsonl", json.dumps({"messages": [asked, REPLIED]}))))) == 1


def test_earlier_turns_beside_an_instruction_are_refused_and_not_left_out(write):
    record = {"instruction": "And then?", "output": "Home.", "history": [["Where to?", "There."]]}
    assert "field 'history' holds earlier turns" in refusal(write("a.jsonl", json.dumps(record)))
    assert list(read_dialogs(write("a.jsonl", json.dumps(record | {"history": []}))))


def test_a_cut_gz_and_a_gz_that_is_none_are_refused(write):
    whole = gzip.compress((GOOD * 999).encode())
    assert "cannot be read: Compressed file ended" in refusal(write("a.jsonl.gz", whole[:-20]))
    assert "cannot be read: Not a gzipped file" in refusal(write("b.jsonl.gz", GOOD))


def test_parquet_without_pyarrow_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(write("a.parquet", "x")).endswith("a.parquet: reading parquet needs pyarrow: pip install pyarrow")


def mutated(rng: random.Random, content: bytes) -> bytes:
    """One to four small harms: a byte changed, a piece cut out, doubled or moved, a fragment put in."""
    odd = [b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\x00", b"\xff", b"\r", b"\n", b"null", b"1e999", b"[" * 2000, b"9" * 5000]
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        piece = content[at : min(end, at + 40)]
        content = rng.choice(
            [
                content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
                content[:at] + content[at + len(piece) :],
                content[:at] + piece + content[at:],
                content[:at],
                content[:at] + rng.choice(odd) + content[at:],
            ]
        )
    return content


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        ("jsonl", 4000),
        ("json", 2000),
        ("csv", 2000),
        ("txt", 500),
        ("jsonl.gz", 1000),
        pytest.param("parquet", 500, marks=pytest.mark.live),
    ],
)
def test_10000_harmed_files_are_each_read_or_refused_with_their_name(tmp_path, kind, n):
    """Never a traceback: whatever is not a DataError fails here. The control: most harms do get a refusal."""
    rng = random.Random(kind)
    records = [record for record, _, _ in NAMED.values()]
    lines = {"json": json.dumps(records), "csv": 'prompt,response\nHi,"Hello, ""you"""\n"a\nb",c\n', "txt": "One.\n\nTwo 日本.\n"}
    whole = lines.get(kind, "\n".join(map(json.dumps, records))).encode()
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist([{"messages": turn("Hi", "Yo")}, {"messages": turn("a", "b")}])
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "whole")
        whole = (tmp_path / "whole").read_bytes()
    if kind.endswith("gz"):
        whole = gzip.compress(whole)
    path, refused = tmp_path / f"a.{kind}", 0
    for _ in range(n):
        path.write_bytes(mutated(rng, whole))
        try:
            for record in read_records(path):
                assert record.dialog
        except DataError as error:
            refused += 1
            assert str(error).startswith(str(path))
    assert refused > n / 10 or kind == "txt"


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def said(prompt: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def test_a_long_document_is_cut_or_dropped_and_counted(tokenizer):
    short, long = said("Hi", "Yes"), said("Hi", "The ferry leaves at nine. " * 10)
    whole = encode_dialog(long, tokenizer, TEMPLATES["plain"])
    length = len(encode_dialog(short, tokenizer, TEMPLATES["plain"])[0])
    documents, fates = encode_documents([short, long], tokenizer, TEMPLATES["plain"], max_length=length)
    assert fates == {"kept": 2, f"of these cut to {length} tokens": 1}
    assert [len(ids) for ids, _ in documents] == [length, length]  # a document of exactly max_length is whole
    for i in (0, 1):
        assert documents[1][i].tolist() == whole[i][:length]
        assert documents[1][i].dtype == np.int32

    documents, fates = encode_documents([short, long], tokenizer, TEMPLATES["plain"], max_length=length, too_long="drop")
    assert fates == {"kept": 1, f"dropped, longer than {length} tokens": 1}
    assert documents[0][0].tolist() == encode_dialog(short, tokenizer, TEMPLATES["plain"])[0]


def test_a_record_whose_reply_is_cut_away_whole_is_dropped_and_counted(tokenizer):
    dialog = said("The ferry leaves at nine and returns before dark.", "Yes")
    prompt = len(encode_dialog(dialog[:1], tokenizer, TEMPLATES["plain"])[0])
    assert encode_documents([dialog], tokenizer, TEMPLATES["plain"], max_length=prompt) == (
        [],
        {f"dropped, reply begins after {prompt} tokens": 1},
    )
    ((_, labels),), fates = encode_documents([dialog], tokenizer, TEMPLATES["plain"], max_length=prompt + 1)
    assert learned(labels, labels) == tokenizer.encode("Yes")[:1]  # one token of the reply is something to learn
    assert fates["kept"] == 1
    documents, _ = encode_documents([dialog], tokenizer, TEMPLATES["plain"], max_length=prompt, train_on_inputs=True)
    assert len(documents) == 1  # where the prompt trains, it is enough


def test_a_document_cut_to_its_begin_token_predicts_nothing_and_is_dropped(tokenizer):
    documents, fates = encode_documents([[{"role": "text", "content": "Once."}]], tokenizer, TEMPLATES["plain"], max_length=1)
    assert (documents, fates) == ([], {"dropped, reply begins after 1 tokens": 1})


def test_an_empty_reply_is_dropped_and_counted(tokenizer):
    dialogs = [said("Hi", ""), said("Hi", " \n"), said("Hi", "Yes"), [{"role": "text", "content": "  "}]]
    documents, fates = encode_documents(dialogs, tokenizer, TEMPLATES["llama2"], max_length=100)
    assert (len(documents), fates) == (1, {"kept": 1, "dropped, no reply": 3})


def test_an_unanswered_last_turn_is_left_off(tokenizer):
    whole, _ = encode_documents([[ASK, REPLY]], tokenizer, TEMPLATES["llama2"], max_length=100)
    asked, fates = encode_documents([[ASK, REPLY, ASK_AGAIN]], tokenizer, TEMPLATES["llama2"], max_length=100)
    assert [part.tolist() for part in asked[0]] == [part.tolist() for part in whole[0]]
    assert fates["kept"] == 1
    documents, fates = encode_documents([[ASK], [SYSTEM, ASK]], tokenizer, TEMPLATES["llama2"], max_length=100)
    assert (documents, fates) == ([], {"dropped, no reply": 2})


ADDED = {"content": "<|im_start|>"}


@pytest.mark.parametrize(
    "name, text",
    [
        ("added_tokens.json", json.dumps({"<|im_start|>": 340, "<s>": 1})),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"1": {"content": "<s>"}, "340": ADDED}})),
        ("tokenizer.json", json.dumps({"added_tokens": [{"content": "<s>"}, ADDED]})),
        ("tokenizer.json", "[1]"),
        ("added_tokens.json", "no JSON"),
    ],
)
def test_records_with_a_token_that_the_model_has_beside_tokenizer_model_are_counted(tokenizer_file, tmp_path, name, text):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / name).write_text(text)
    tokenizer, counted = Tokenizer(tmp_path / "tokenizer.model"), {"kept": 2}
    if "<|" in text:
        counted["of these hold <|im_start|>, one token each for transformers, here spelt in pieces"] = 1
    dialogs = [[ASK, REPLY], [{"role": "user", "content": "<s> <|im_start|>"}, REPLY]]
    assert encode_documents(dialogs, tokenizer, TEMPLATES["plain"], max_length=99)[1] == counted


def test_every_record_is_kept_or_counted_as_dropped():
    tokenizer = Tokenizer(shared("llama2_tokenizer.model"))
    for too_long in ("cut", "drop"):
        documents, fates = encode_documents(
            read_dialogs(shared("no_robots_test.jsonl")), tokenizer, TEMPLATES["llama2"], max_length=256, too_long=too_long
        )
        assert len(documents) == fates["kept"]
        assert fates["kept"] + sum(n for fate, n in fates.items() if fate.startswith("dropped")) == 500
        assert all(len(ids) <= 256 and any(labels[1:] != IGNORE) for ids, labels in documents)


def test_documents_in_a_file_are_those_in_memory_and_are_written_once(tokenizer, tmp_path):
    dialogs = [
        [SYSTEM, ASK, REPLY, ASK_AGAIN, REPLY_AGAIN],
        said("Hi", "Yes"),
        said("Hi", ""),
        [{"role": "text", "content": "x"}],
    ]
    how = {"max_length": 70}
    in_memory, fates = encode_documents(dialogs, tokenizer, TEMPLATES["llama2"], **how)
    on_disk, same_fates = encode_documents(dialogs, tokenizer, TEMPLATES["llama2"], **how, cache=tmp_path / "key")
    assert fates == same_fates and fates["dropped, no reply"] == 1
    for documents in (on_disk, encode_documents(None, tokenizer, TEMPLATES["llama2"], **how, cache=tmp_path / "key")[0]):
        assert len(documents) == 3
        for (ids, labels), (expected_ids, expected_labels) in zip(documents, in_memory, strict=True):
            assert (ids.tolist(), labels.tolist()) == (expected_ids.tolist(), expected_labels.tolist())
            assert ids.dtype == labels.dtype == np.int32
    packed, expected = PackedBatches(on_disk, 128, seed=1), PackedBatches(in_memory, 128, seed=1)
    assert all(torch.equal(packed.batch(0, 0)[name], expected.batch(0, 0)[name]) for name in ("tokens", "labels", "cu_seqlens"))
    assert sorted(os.listdir(tmp_path)) == ["key", "key.lock"]
    empty, fates = encode_documents([], tokenizer, TEMPLATES["llama2"], **how, cache=tmp_path / "none")
    assert len(empty) == 0 and fates == {}


def test_a_token_file_keeps_the_id_0_and_its_label(tmp_path):
    """A token that is only read is kept as its complement: that of 0 is -1."""
    write_tokens(tmp_path, [(np.array([0, 5, 0], np.int32), np.array([IGNORE, 5, 0], np.int32))], {})
    ((ids, labels),) = TokenFile(tmp_path)
    assert ids.tolist() == [0, 5, 0] and labels.tolist() == [IGNORE, 5, 0]


def test_a_bad_record_leaves_no_half_written_token_file(tokenizer, write, tmp_path):
    dialogs = read_dialogs(write("a.jsonl", GOOD * 600 + "{"))
    with pytest.raises(DataError, match="line 601"):
        encode_documents(dialogs, tokenizer, TEMPLATES["llama2"], max_length=9, cache=tmp_path / "cache" / "key")
    assert os.listdir(tmp_path / "cache") == ["key.lock"]


def test_tokens_that_no_run_asked_for_in_90_days_are_forgotten(tokenizer, tmp_path):
    def ask(name):
        return encode_documents([[ASK, REPLY]], tokenizer, TEMPLATES["llama2"], max_length=70, cache=tmp_path / name)[0]

    def age(days):
        for path in tmp_path.iterdir():
            os.utime(path, (then := time.time() - days * 86400, then))

    for name in ("unused", "used"):
        ask(name)
    held = ask("unused")
    age(91)
    ask("used")  # which is asked for once more
    (tmp_path / "killed.tmp").mkdir()
    age_of_used = (tmp_path / "used").stat().st_mtime
    ask("new")
    assert sorted(os.listdir(tmp_path)) == ["killed.tmp", "new", "new.lock", "used"] and time.time() - age_of_used < 60
    assert held[0][0].tolist() == ask("new")[0][0].tolist()  # who still reads them is not disturbed
    age(89)
    ask("newer")
    assert {"killed.tmp", "new", "used"} <= set(os.listdir(tmp_path))


def process(work) -> int:
    """The number of a new process that does the work and ends."""
    if not (pid := os.fork()):
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.mark.parametrize("killed", [False, True])
def test_of_several_processes_one_tokenises_and_the_others_wait_and_map_it(tokenizer, tmp_path, killed):
    """Eight ranks that each tokenise 5 GB take eight times the memory and, on eight cores, all of them. If the one is killed at
    work, the next begins anew."""
    dialogs, log = [said(f"Who is {i}?", f"Mira {i}.") for i in range(600)], tmp_path / "log"

    def reading():
        for i, dialog in enumerate(dialogs):
            if i == 300:  # one batch is written, and there is time for the others to come
                with open(log, "a") as file:
                    file.write(f"{os.getpid()}\n")
                time.sleep(0.5)
                if killed and len(log.read_text().split()) == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield dialog

    def rank():
        documents, fates = encode_documents(reading(), tokenizer, TEMPLATES["plain"], max_length=99, cache=tmp_path / "c" / "key")
        assert fates == {"kept": 600} and len(documents) == 600
        assert documents[599][0].tolist() == encode_dialog(dialogs[599], tokenizer, TEMPLATES["plain"])[0]

    ends = [os.waitpid(pid, 0)[1] for pid in [process(rank) for _ in range(3)]]
    assert sorted(ends) == [0, 0, signal.SIGKILL if killed else 0]
    assert len(log.read_text().split()) == 1 + killed
    assert sorted(os.listdir(tmp_path / "c")) == ["key", "key.lock"]


def test_where_files_cannot_be_locked_each_process_writes_for_itself(tokenizer, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    cache = tmp_path / "key"

    def late():  # another process is first while this one writes
        shutil.copytree(whole, cache)
        yield said("Hi", "Yes")

    whole = tmp_path / "whole"
    encode_documents([said("Hi", "Yes")], tokenizer, TEMPLATES["plain"], max_length=99, cache=whole)
    documents, fates = encode_documents(late(), tokenizer, TEMPLATES["plain"], max_length=99, cache=cache)
    assert len(documents) == 1 and fates == {"kept": 1}
    assert sorted(os.listdir(tmp_path)) == ["key", "key.lock", "whole", "whole.lock"]


def test_a_disk_that_is_full_is_told_and_leaves_no_tokens(tokenizer, tmp_path):
    """NumPy's own tofile and save say nothing where small writes fail: the rest of the file would be missing, or zeros."""
    dialogs, cache = [said(f"Who is {i}?", "Mira.") for i in range(600)], tmp_path / "cache" / "key"

    def writing():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))  # no file can grow beyond 16 KB: these tokens take 50
        with pytest.raises(DataError, match="cache cannot keep the tokens: File too large; XDG_CACHE_HOME names"):
            encode_documents(dialogs, tokenizer, TEMPLATES["plain"], max_length=99, cache=cache)

    assert os.waitpid(process(writing), 0)[1] == 0
    assert os.listdir(tmp_path / "cache") == ["key.lock"]


def test_tokens_that_are_whole_are_read_where_nothing_can_be_written_and_others_ask_for_a_place(tokenizer, write, tmp_path):
    how = {"max_length": 99, "cache": tmp_path / "key"}
    encode_documents([said("Hi", "Yes")], tokenizer, TEMPLATES["plain"], **how)
    (tmp_path / "key.lock").unlink()
    (tmp_path / "key.lock").mkdir()  # opening it fails, for root as well
    assert encode_documents(None, tokenizer, TEMPLATES["plain"], **how)[1] == {"kept": 1}
    how["cache"] = write("file", "") / "nanotune" / "key"
    with pytest.raises(DataError, match="nanotune cannot keep the tokens: Not a directory; XDG_CACHE_HOME names another place"):
        encode_documents([said("Hi", "Yes")], tokenizer, TEMPLATES["plain"], **how)


def test_the_token_files_name_changes_with_whatever_decides_its_content(tokenizer, tiny_tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, other = write("a.jsonl", GOOD), write("b.jsonl", GOOD + GOOD)
    assert cache_folder([path], tokenizer, 1) is None  # too small to be worth a file
    monkeypatch.setattr("preparing.cache.CACHE_FROM", 1)
    name = cache_folder([path], tokenizer, 1)
    assert name.parent == tmp_path / "nanotune" and name == cache_folder([write("c.jsonl", GOOD)], tokenizer, 1)
    assert (
        len(
            {
                name,
                cache_folder([other], tokenizer, 1),
                cache_folder([path], tokenizer, 2),
                cache_folder([path] * 2, tokenizer, 1),
                cache_folder([write("a.txt", GOOD)], tokenizer, 1),  # the same bytes, and each line raw text
                cache_folder([path], tiny_tokenizer, 1),
            }
        )
        == 6
    )
    other.write_text(GOOD)
    os.utime(other, (1, 1))  # as if it had been written at another time, which the clock of a disk may not tell
    assert cache_folder([other], tokenizer, 1) == name
    monkeypatch.setattr("preparing.cache.PROGRAMS", [write("data.py", "")])  # whoever changes a template gets its tokens
    assert cache_folder([path], tokenizer, 1) != name


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def random_documents(n: int, longest: int, seed: int = 0) -> list:
    """Every token of every document is different, so that wherever one lands it can be told whose it is; a random half trains."""
    rng = np.random.default_rng(seed)
    documents, first = [], 1
    for size in rng.integers(2, longest + 1, n):
        ids = np.arange(first, first + size, dtype=np.int32)
        documents.append((ids, np.where(rng.random(size) < 0.5, ids, IGNORE).astype(np.int32)))
        first += size
    return documents


def spans(batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) between each two borders."""
    borders = batch["cu_seqlens"].tolist()
    return [(batch["tokens"][start:end].tolist(), batch["labels"][start:end].tolist()) for start, end in pairwise(borders)]


def documents_of(batch) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids, _ in spans(batch) if ids[0] != PAD_ID]


@pytest.mark.parametrize(("n", "longest", "row"), [(300, 40, 64), (50, 64, 64), (1, 5, 8), (400, 3, 100)])
def test_an_epoch_holds_every_document_once_and_whole(n, longest, row):
    documents = random_documents(n, longest)
    batches = PackedBatches(documents, row, seed=3)
    for epoch in (0, 1):
        seen = Counter(ids for i in range(len(batches)) for ids in documents_of(batches.batch(epoch, i)))
        assert seen == Counter(tuple(ids.tolist()) for ids, _ in documents)


def test_every_batch_has_the_same_shape_and_borders_from_0_to_the_end():
    batches = PackedBatches(random_documents(100, 40), 64)
    for index in range(len(batches) + 3):
        batch = batches.batch(0, index)
        assert {name: (x.dtype, x.dim()) for name, x in batch.items()} == {
            "tokens": (torch.int64, 1),
            "labels": (torch.int64, 1),
            "cu_seqlens": (torch.int32, 1),
        }
        assert len(batch["tokens"]) == len(batch["labels"]) == 64
        borders = batch["cu_seqlens"].tolist()
        assert borders[0] == 0 and borders[-1] == 64
        assert borders == sorted(set(borders))  # no document is empty


def test_labels_are_the_next_token_of_the_same_document_and_never_of_the_next_one():
    documents = random_documents(200, 30)
    known = {tuple(ids.tolist()): labels.tolist() for ids, labels in documents}
    batches = PackedBatches(documents, 64)
    assert sum(batches.supervised) == sum(int((batches.batch(0, i)["labels"] != IGNORE).sum()) for i in range(len(batches)))
    for index in range(len(batches)):
        for ids, labels in spans(batches.batch(0, index)):
            if ids[0] == PAD_ID:  # the tail: nothing but padding, nothing to learn
                assert set(ids) == {PAD_ID} and set(labels) == {IGNORE}
            else:
                assert labels == [*known[tuple(ids)][1:], IGNORE]


def test_a_row_that_is_full_has_no_tail():
    documents = [(np.arange(1, 5), np.arange(1, 5)), (np.arange(5, 9), np.arange(5, 9))]
    batch = PackedBatches(documents, 8, shuffle=False).batch(0, 0)
    assert batch["cu_seqlens"].tolist() == [0, 4, 8]
    assert batch["tokens"].tolist() == list(range(1, 9))
    assert batch["labels"].tolist() == [2, 3, 4, IGNORE, 6, 7, 8, IGNORE]


def test_past_the_last_row_a_batch_is_empty_but_shaped_alike():
    batches = PackedBatches(random_documents(20, 20), 32)
    batch = batches.batch(0, len(batches))
    assert set(batch["tokens"].tolist()) == {PAD_ID}
    assert set(batch["labels"].tolist()) == {IGNORE}
    assert batch["cu_seqlens"].tolist() == [0, 32]


def rows(batches, epoch: int) -> list[tuple[int, ...]]:
    return [tuple(batches.batch(epoch, i)["tokens"].tolist()) for i in range(len(batches))]


def test_a_batch_is_a_pure_function_of_seed_and_epoch():
    """Asked for out of order, twice, or by another process, a batch is the same: what an exact resume rests on."""
    documents = random_documents(200, 30)
    one, two = PackedBatches(documents, 64, seed=5), PackedBatches(documents, 64, seed=5)
    epoch_1 = rows(one, 1)
    assert rows(two, 0) == rows(one, 0)
    assert [tuple(two.batch(1, i)["tokens"].tolist()) for i in reversed(range(len(two)))] == epoch_1[::-1]
    assert rows(PackedBatches(documents, 64, seed=6), 1) != epoch_1


def test_epochs_differ_in_order_only():
    batches = PackedBatches(random_documents(200, 30), 64, seed=5)
    first, second, third = (rows(batches, epoch) for epoch in range(3))
    assert first != second != third != first
    assert sorted(first) == sorted(second) == sorted(third)


def test_without_shuffle_documents_stay_in_order_in_every_epoch():
    documents = [(np.full(8, i), np.full(8, i)) for i in range(1, 6)]
    batches = PackedBatches(documents, 8, shuffle=False)
    assert [row[0] for row in rows(batches, 0)] == [row[0] for row in rows(batches, 7)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_together_read_every_row_once(world):
    """Rank r takes rows r, r + world, ...; past the end it gets empty rows, so that all ranks do the same number of steps."""
    batches = PackedBatches(random_documents(200, 30), 64)
    steps = -(-len(batches) // world)
    read = [tuple(batches.batch(2, step * world + rank)["tokens"].tolist()) for rank in range(world) for step in range(steps)]
    real = [row for row in read if any(row)]
    assert len(read) - len(real) == steps * world - len(batches)
    assert sorted(real) == sorted(rows(batches, 2))


@pytest.mark.parametrize(("length", "claimed"), [(512, 0.95), (2048, 0.99)])
def test_real_rows_are_as_full_as_the_comment_in_packed_batches_says(llama2_tokenizer, length, claimed):
    dialogs = read_dialogs(shared("no_robots_test.jsonl"))
    documents, _ = encode_documents(dialogs, llama2_tokenizer, TEMPLATES["llama2"], max_length=length)
    batches = PackedBatches(documents, length)
    assert sum(len(ids) for ids, _ in documents) / (len(batches) * length) == pytest.approx(claimed, abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class Flags:
    # First group
    steps: int = 10  # how many, 100 % of them
    rate: float | None = None  # how fast
    resume: bool = False  # go on
    # Second group
    dtype: Literal["auto", "bf16"] = "auto"  # number format
    data: tuple[str, ...] = ()  # files
    name: str | None = None


def flags(*argv: str) -> dict:
    return parse_flags(Flags, "A test.", list(argv))


def complaint(capsys, *argv: str) -> str:
    """The one line on stderr that bad flags end in, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        flags(*argv)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def test_only_the_flags_that_were_given_come_back_with_their_types():
    assert flags() == {}
    assert flags("--steps", "3", "--rate=1e-4", "--dtype", "bf16", "--data", "a", "b", "--name", "x y") == {
        "steps": 3,
        "rate": 1e-4,
        "dtype": "bf16",
        "data": ["a", "b"],
        "name": "x y",
    }


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--resume"], True),
        (["--resume", "True"], True),
        (["--resume", "False"], False),
        (["--resume=false"], False),
        (["--resume", "--steps", "3"], True),
    ],
)
def test_a_switch_reads_alone_or_with_true_or_false(argv, value):
    """argparse's own type=bool makes `--resume False` true: any text that is not empty is."""
    assert flags(*argv)["resume"] is value


def test_bad_flags_end_with_code_2_and_one_line_that_says_what_is_known(capsys):
    assert "unknown argument --step, did you mean --steps?" in complaint(capsys, "--step", "3")
    assert "unknown argument --stpes=3, did you mean --steps?" in complaint(capsys, "--stpes=3")
    assert "unknown argument --zzz (" in complaint(capsys, "--zzz")
    assert "unknown argument stray" in complaint(capsys, "--steps", "3", "stray")
    message = complaint(capsys, "--dtype", "fp8")
    assert "--dtype" in message and "fp8" in message and "auto" in message and "bf16" in message
    assert "--steps: invalid int value: '1.5'" in complaint(capsys, "--steps", "1.5")
    assert "--rate: invalid float value: 'fast'" in complaint(capsys, "--rate", "fast")
    assert "'maybe' is neither True nor False" in complaint(capsys, "--resume", "maybe")
    assert "--name: expected one argument" in complaint(capsys, "--name")


def test_help_shows_every_fields_comment_default_and_group(capsys):
    with pytest.raises(SystemExit) as ended:
        flags("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("A test.", "First group", "Second group", "how many, 100 % of them [10]", "how fast", "go on [False]"):
        assert shown in text
    assert "number format [auto]" in text and "{auto,bf16}" in text and "--name" in text
