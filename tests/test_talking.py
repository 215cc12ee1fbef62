"""Talking: what was said is heard, what does not fit goes from the oldest turn, nobody is given another's answer."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import answer, load

import generate as generate_module
from data import DataError, read_dialogs
from generate import GenerateConfig, Sampling
from lora import add_lora, lora_parameters, save_adapter
from model import load_model, save_hf, to_hf
from talking import chat
from talking.chat import Reply, fit
from talking.voices import Voice, load_voices

ROOT = Path(__file__).parents[1]
PROMPT = [1, 17, 4, 93, 58, 21]


def said(voice: Voice, sampling, *messages) -> str:
    """The oracle: the reply to these messages, user and assistant in turn; a first one of None is no system message."""
    dialog = [{"role": "system", "content": messages[0]}] if messages[0] else []
    for i, message in enumerate(messages[1:]):
        dialog.append({"role": ("user", "assistant")[i % 2], "content": message})
    return answer(voice.model, voice.tokenizer, voice.template, dialog, sampling)


@pytest.fixture
def voices(base, adapter) -> list[Voice]:
    return load_voices(GenerateConfig(adapter=(str(adapter),), compare=True, device="cpu"))


@pytest.fixture
def typed(run, monkeypatch):
    """typed(lines, *argv) -> what `run` returns, with these lines (text or bytes) at standard input."""

    def typed(lines, *argv):
        lines = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return run(*argv)

    return typed


# ---------------------------------------------------------------------------------------------------------------------
# Voices


def test_all_voices_stand_on_one_copy_of_the_weights(base, adapter):
    """The modules differ, the tensors are the same: two adapters over a 7B are no 27 GB."""
    base_voice, *adapted = load_voices(GenerateConfig(adapter=(str(adapter), str(adapter)), device="cpu"))
    weights = {weight.data_ptr() for weight in base_voice.model.parameters()}
    own = [{id(weight) for weight in lora_parameters(voice.model).values()} for voice in adapted]
    assert all(own) and not own[0] & own[1]
    for voice in adapted:
        assert {w.data_ptr() for n, w in voice.model.named_parameters() if "lora_" not in n} == weights


def test_a_quantised_base_lies_in_memory_once_too(base, adapter):
    one, other = load_voices(GenerateConfig(adapter=(str(adapter),), compare=True, quantize="nf4", device="cpu"))
    shared = {t.data_ptr() for t in (*one.model.parameters(), *one.model.buffers()) if t.numel()}
    theirs = {t.data_ptr() for t in (*other.model.parameters(), *other.model.buffers()) if t.numel()}
    assert shared < theirs and len(theirs - shared) == len(lora_parameters(other.model))


def test_each_voice_says_what_it_says_alone(base, adapter, voices):
    """Also in turns: an adapter that leaked into the base would change its second answer."""
    tokens = torch.tensor(PROMPT)
    alone = [load(GenerateConfig(model=str(base), device="cpu")), load(GenerateConfig(adapter=(str(adapter),), device="cpu"))]
    for _ in range(2):
        for voice, (model, _, _) in zip(voices, alone, strict=True):
            assert torch.equal(voice.model(tokens), model(tokens))
    assert not torch.allclose(voices[0].model(tokens), voices[1].model(tokens), atol=0.1)


def test_the_base_is_asked_in_the_template_of_its_adapter(voices):
    assert voices[0].template == voices[1].template
    assert voices[0].template.stop == ("### Instruction:",)  # alpaca's, as the run's run.json says


def test_one_adapter_answers_alone_and_compare_or_a_second_one_brings_the_base(adapter, base):
    def names(**flags):
        return [voice.name for voice in load_voices(GenerateConfig(device="cpu", **flags))]

    assert names(model=str(base)) == ["base"]
    assert names(adapter=(str(adapter),)) == [str(adapter)]
    assert names(adapter=(str(adapter),), compare=True) == ["base (base)", str(adapter)]
    assert names(adapter=(str(adapter),) * 2) == ["base (base)", str(adapter), str(adapter)]


def test_adapters_of_different_bases_are_not_compared(adapter, base, tmp_path):
    for name, change in (("moved", {"base_model": str(tmp_path / "copy")}), ("packed", {"settings": {"quantize": "nf4"}})):
        shutil.copytree(adapter, tmp_path / name)
        settings = json.loads((adapter / "run.json").read_text()) | change
        (tmp_path / name / "run.json").write_text(json.dumps(settings))
    shutil.copytree(base, tmp_path / "copy")
    for name in ("moved", "packed"):
        with pytest.raises(DataError, match=r"run was trained on .*base \(none\), .* adapters are compared on one base"):
            load_voices(GenerateConfig(adapter=(str(adapter), str(tmp_path / name)), device="cpu"))
    named = {"model": str(base), "quantize": "none"}
    assert len(load_voices(GenerateConfig(adapter=(str(adapter), str(tmp_path / "moved")), device="cpu", **named))) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The window


def test_turns_are_left_out_from_the_oldest_until_the_answer_fits_and_the_system_message_stays(voices):
    voice = voices[0]
    dialog = [{"role": "system", "content": "Be brief."}]
    for i in range(6):
        dialog += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    dialog.append({"role": "user", "content": "Last?"})
    window, whole = voice.model.config.max_seq_len, fit(dialog, voice, 1)[0]
    for room in range(1, window, 97):  # also when nothing has to go, and when all but the last question has
        ids, left_out = fit(dialog, voice, room)
        kept = [dialog[0], *dialog[1 + 2 * left_out :]]
        assert ids == chat.encode_dialog(kept, voice.tokenizer, voice.template)[0]
        assert len(ids) + room <= window or left_out == 6
        if left_out:  # no more than needed
            more = [dialog[0], *dialog[1 + 2 * (left_out - 1) :]]
            assert len(chat.encode_dialog(more, voice.tokenizer, voice.template)[0]) + room > window
    assert fit(dialog, voice, window - len(whole)) == (whole, 0)
    assert fit(dialog, voice, window - len(whole) + 1)[1] == 1
    assert fit(dialog, voice, window)[1] == 6


def test_it_is_said_when_turns_were_left_out(typed, tiny_llama, tokenizer_file, tmp_path):
    save_hf(tiny_llama(vocab_size=340, max_seq_len=120), tmp_path / "m")
    argv = ("--model", tmp_path / "m", "--tokenizer", tokenizer_file, "--max_new_tokens", 20)
    code, _, err = typed("Where does Mira live?\n" * 4, *argv)
    lines = [line for line in err.splitlines() if "tokens/s" in line]
    assert code == 0 and len(lines) == 4 and "left out" not in lines[0]
    assert "of the oldest turns left out, to fit the window of 120 tokens" in lines[3]


def test_a_question_longer_than_the_window_ends_a_script_with_code_2_and_one_line(typed, tiny_llama, tokenizer_file, tmp_path):
    save_hf(tiny_llama(vocab_size=340, max_seq_len=40), tmp_path / "m")
    code, out, err = typed("why " * 90, "--model", tmp_path / "m", "--tokenizer", tokenizer_file)
    assert (code, out) == (2, "")
    assert re.search(r"^generate.py: the prompt has \d+ tokens and the model's window 40: nothing is left", err, re.M)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def test_what_was_said_is_heard_by_the_next_answer(typed, base):
    voice = load_voices(GenerateConfig(model=str(base), device="cpu"))[0]
    how = Sampling(max_new_tokens=8)
    first = said(voice, how, None, "Where?")
    second = said(voice, how, None, "Where?", first, "And she?")
    assert second != said(voice, how, None, "And she?")  # the control
    code, out, err = typed("Where?\n\nAnd she?\n", "--model", base, "--max_new_tokens", 8)
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert err.splitlines()[0] == "base, a window of 4096 tokens; /help"


def test_the_commands_do_what_help_says(typed, base):
    """Sampled at temperature 1, so that another seed is another answer."""
    voice = load_voices(GenerateConfig(model=str(base), device="cpu"))[0]

    def at(seed, *messages):
        return said(voice, Sampling(max_new_tokens=6, temperature=1.0, seed=seed), *messages)

    one = at(5, None, "One?")
    again, third = at(6, None, "One?"), at(7, None, "One?")
    assert len({one, again, third}) == 3
    script = "One?,/regenerate,/regenerate,Two?,/undo,/system Be brief.,Two?,/reset,One?,/system,/reset,One?,/help,/quit,X?"
    script = script.replace(",", "\n")
    code, out, err = typed(script, "--model", base, "--max_new_tokens", 6, "--temperature", 1, "--seed", 5)
    expected = [one, again, third, at(5, None, "One?", third, "Two?"), at(5, "Be brief.", "One?", third, "Two?")]
    expected += [at(5, "Be brief.", "One?"), one, chat.HELP]
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))
    assert "(forgotten: Two?)" in err


def test_a_byte_order_mark_is_no_part_of_the_first_line(typed, base):
    assert typed(b"\xef\xbb\xbf/help\n", "--model", base)[:2] == (0, chat.HELP + "\n")


def test_undo_and_regenerate_say_that_nothing_was_said_and_an_unknown_command_is_not_sent(typed, base):
    code, out, err = typed("/undo\n/regenerate\n", "--model", base)
    assert (code, out, err.count("(nothing was said yet)")) == (0, "", 2)
    code, out, err = typed("/rest\n", "--model", base)
    assert (code, out) == (2, "")
    assert "generate.py: unknown command /rest: known are /reset, /undo, /regenerate, /system, /help, /quit" in err


def test_input_that_is_not_utf_8_ends_a_script_with_its_line(typed, base):
    code, _, err = typed(b"Where?\ncaf\xe9?\n", "--model", base, "--max_new_tokens", 1)
    assert code == 2
    assert err.endswith("generate.py: line 2 of the input is not UTF-8 text (character 4)\n")


@pytest.mark.parametrize("flag", ["--prompt", "--system", "--stop"])
def test_a_flag_that_is_not_utf_8_is_named(run, base, tmp_path, flag):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Who?"}\n')
    asked = [] if flag == "--prompt" else ["--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl"]
    for argv in ([], asked):  # without asked: a chat
        code, out, err = run("--model", base, *argv, flag, "caf\udce9")
        assert (code, out, err) == (2, "", f"generate.py: {flag} is not UTF-8 text (character 4)\n")


def test_a_closed_standard_input_or_output_is_no_traceback(run, base, monkeypatch):
    """Python makes None of them."""
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = run("--model", base)
    assert (code, out) == (2, "")
    assert err == "generate.py: a chat needs a standard input, and it is closed: ask by --prompt or --prompts\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert run("--model", base, "--prompt", "Where?", "--max_new_tokens", 3)[0] == 0


def test_every_voice_answers_under_its_name(typed, run, adapter, voices):
    how = Sampling(max_new_tokens=6)
    first = [said(voice, how, None, "Where?") for voice in voices]
    second = [said(voice, how, None, "Where?", heard, "And?") for voice, heard in zip(voices, first, strict=True)]
    shown = ["".join(f"--- {v.name}\n{text}\n" for v, text in zip(voices, texts, strict=True)) for texts in (first, second)]
    argv = ("--adapter", adapter, "--compare", "--max_new_tokens", 6)
    assert typed("Where?\nAnd?\n", *argv)[:2] == (0, shown[0] + shown[1])
    assert run(*argv, "--prompt", "Where?")[:2] == (0, shown[0])


class Terminal:
    """The program in a pseudo-terminal, as a user has it."""

    def __init__(self, *argv):
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in a shell's background
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "generate.py", *map(str, argv)])

    def type(self, keys: bytes, until: bytes) -> bytes:
        """What is written after these keys, up to this text. Pressed again where nothing comes: between its prompt and its wait
        for keys readline lets a Ctrl-C lie until the next key."""
        os.write(self.screen, keys)
        written, deadline = b"", time.time() + 120
        while until not in written:
            assert time.time() < deadline, written
            if select.select([self.screen], [], [], 5)[0]:
                written += os.read(self.screen, 4096)
            else:
                os.write(self.screen, keys)
        return written


@pytest.fixture
def endless(tiny_llama, tokenizer_file, tmp_path):
    """A folder with a model that never ends an answer: the end token's logit is 0 whatever comes, so others are above it."""
    model = tiny_llama(vocab_size=340)
    model.output.weight.data[2] = 0
    save_hf(model, tmp_path / "endless")
    (tmp_path / "endless" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return tmp_path / "endless"


def test_ctrl_c_stops_the_answer_and_not_the_program_and_neither_does_a_mistake(endless):
    terminal = Terminal("--model", endless, "--device", "cpu", "--max_new_tokens", 4000)
    try:
        terminal.type(b"", until=b"> ")
        terminal.type(b"Where?\r", until=b"Where?\r\n")  # the echo; then the answer
        begun = b""
        while len(begun) < 40:  # longer than what readline writes at its end, which would swallow a Ctrl-C
            begun += os.read(terminal.screen, 4096)
        stopped = terminal.type(b"\x03", until=b" tokens/s")
        assert 0 < int(re.search(rb"\[stopped; (\d+) tokens", stopped)[1]) < 4000
        terminal.type(b"\x03", until=b"Ctrl-D or /quit ends")
        terminal.type(b"/rest\r", until=b"unknown command /rest")
        terminal.type(b"/undo\r", until=b"forgotten: Where?")  # what was stopped had been said
        deadline, ended = time.time() + 60, (0, 0)
        while not ended[0] and time.time() < deadline:  # Ctrl-D, too, is lost before readline waits
            os.write(terminal.screen, b"\x04")
            time.sleep(0.5)
            ended = os.waitpid(terminal.pid, os.WNOHANG)
        assert ended == (terminal.pid, 0)
    finally:
        os.close(terminal.screen)  # which ends a program that is still there


# ---------------------------------------------------------------------------------------------------------------------
# A file of prompts


@pytest.fixture
def prompts(tmp_path):
    """Five records of different kinds, and what is asked in them."""
    records = [
        {"prompt": "Where?"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
            "provenance": "old.csv, line 9",
        },
        {
            "messages": [
                {"role": r, "content": c} for r, c in (("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
            ]
        },
        {"prompt": "Why does the ferry leave?", "response": "It must."},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    user = {"role": "user"}
    asked = [
        [user | {"content": "Where?"}],
        [user | {"content": "Add.", "input": "1 and 2"}],
        [{"role": "system", "content": "Be brief."}, user | {"content": "Who?"}],
        [user | {"content": "A?"}, {"role": "assistant", "content": "B."}, user | {"content": "C?"}],
        [user | {"content": "Why does the ferry leave?"}],
    ]
    return path, asked


def test_a_file_is_answered_in_its_order_and_the_answers_are_data(run, base, prompts, tmp_path):
    path, asked = prompts
    voice = load_voices(GenerateConfig(model=str(base), device="cpu"))[0]
    argv = ("--model", base, "--prompts", path, "--max_new_tokens", 9, "--out")
    assert run(*argv, tmp_path / "out.jsonl", "--batch_size", 2)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3, 4]
    places = [line["provenance"] for line in lines]
    assert places == [
        "prompts.jsonl, line 1",
        "prompts.jsonl, line 2",
        "old.csv, line 9",
        "prompts.jsonl, line 4",
        "prompts.jsonl, line 5",
    ]
    for line, dialog in zip(lines, asked, strict=True):
        alone = answer(voice.model, voice.tokenizer, voice.template, dialog, Sampling(max_new_tokens=9)).strip()
        assert line["messages"] == [*dialog, {"role": "assistant", "content": alone}]
    assert list(read_dialogs(tmp_path / "out.jsonl")) == [line["messages"] for line in lines]
    for size in (1, 3, 8):
        assert run(*argv, tmp_path / f"{size}.jsonl", "--batch_size", size)[0] == 0
        assert (tmp_path / f"{size}.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_a_system_flag_reaches_the_prompts_that_have_none(run, base, prompts, tmp_path):
    run("--model", base, "--prompts", prompts[0], "--out", tmp_path / "o.jsonl", "--max_new_tokens", 1, "--system", "Shout.")
    systems = [json.loads(line)["messages"][0] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [m["content"] for m in systems] == ["Shout.", "Shout.", "Be brief.", "Shout.", "Shout."]


def test_a_run_killed_anywhere_goes_on_behind_the_last_whole_line(run, base, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    argv = ("--model", base, "--prompts", prompts[0], "--out", out, "--samples", 2, "--temperature", 1, "--max_new_tokens", 7)
    assert run(*argv, "--batch_size", 3)[0] == 0
    whole = out.read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:length])
        _, _, err = run(*argv, "--batch_size", 4)
        assert out.read_bytes() == whole
        there = whole[:length].count(b"\n")
        assert (f"{there} of 10 answers are there already" in err) == bool(there)


def test_a_file_that_answers_something_else_is_not_touched(run, base, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    argv = ["--model", base, "--prompts", prompts[0], "--out", out, "--max_new_tokens", 2]
    run(*argv)
    whole = out.read_bytes()
    for more in (["--seed", 1], ["--max_new_tokens", 3], ["--system", "x"], ["--samples", 2, "--temperature", 1]):
        code, _, err = run(*argv, *more)
        assert code == 2 and "out.jsonl, line 1 is not an answer to these prompts with these flags: name a new --out" in err
    few = prompts[0].with_name("few.jsonl")
    few.write_text("".join(prompts[0].read_text().splitlines(True)[:2]))
    shutil.copy(prompts[0], tmp_path / "before.jsonl")
    code, _, err = run("--model", base, "--prompts", prompts[0], "--out", prompts[0])
    assert code == 2 and "line 1 is not an answer" in err
    assert prompts[0].read_bytes() == (tmp_path / "before.jsonl").read_bytes()
    for foreign in (b"My notes.", b'[{"prompt": "Where?"}]', b'{"index": 0, "sample": 1'):  # no line end: is it one cut short?
        for before in (b"", whole):
            out.write_bytes(before + foreign)
            code, _, err = run(*argv)
            assert code == 2 and ("has 6 lines" if before else "line 1 is not an answer") in err
            assert out.read_bytes() == before + foreign
    out.write_bytes(whole.replace(b"prompts.jsonl", b"few.jsonl"))
    code, _, err = run("--model", base, "--prompts", few, "--out", out, "--max_new_tokens", 2)
    assert code == 2 and "has 5 lines, and there are 2 answers to give" in err
    assert out.read_bytes() == whole.replace(b"prompts.jsonl", b"few.jsonl")


def test_samples_differ_are_the_same_each_time_and_the_first_is_the_answer_to_prompt(run, base, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "Where?"}\n')
    how = ("--model", base, "--max_new_tokens", 12, "--temperature", 1, "--seed", 3)
    run(*how, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--samples", 3, "--batch_size", 2)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    texts = [line["messages"][-1]["content"] for line in lines]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(2) for s in range(3)]
    assert len(set(texts)) == 6
    printed = run(*how, "--prompt", "Where?", "--samples", 3)[1]
    assert printed == "".join(f"--- {n} of 3\n{text}\n" for n, text in enumerate(texts[3:], start=1))
    assert run(*how, "--prompt", "Where?")[1].strip() == texts[3]


def test_many_samples_are_made_some_at_a_time(run, base, monkeypatch):
    """A thousand answers at once would be a thousand caches."""
    together, answers = [], chat.answers
    monkeypatch.setattr(chat, "answers", lambda *of: together.append(len(of[3])) or answers(*of))
    how = ("--model", base, "--max_new_tokens", 5, "--temperature", 1, "--prompt", "Who?", "--samples")
    twenty, two = run(*how, 20)[1], run(*how, 2)[1]
    assert together == [8, 8, 4, 2]
    assert twenty.replace("of 20", "of 2").startswith(two) and len(set(re.split(r"--- .*\n", twenty))) > 15


def test_an_answer_of_a_batch_ends_before_a_stop_string_as_alone(run, base, tmp_path):
    voice = load_voices(GenerateConfig(model=str(base), device="cpu"))[0]
    whole = said(voice, Sampling(max_new_tokens=30), None, "Who?").strip()
    stop = whole[5:8]
    (tmp_path / "p.jsonl").write_text('{"prompt": "Where?"}\n{"prompt": "Who?"}\n')
    argv = ("--model", base, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl", "--max_new_tokens", 30)
    run(*argv, "--stop", stop)
    text = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[1])["messages"][-1]["content"]
    assert text == whole[: whole.index(stop)].strip() and text != whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "Once upon a time."}', "line 2: raw text asks nothing"),
        ('{"prompt": 7}', "line 2: no known fields among prompt"),
        ('{"prompt": "x"', "line 2: not JSON"),
        ('{"prompt": "\\ud83d"}', "line 2: holds half a character"),
        (json.dumps({"prompt": "why " * 3000}), "line 2: the prompt has"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_is_answered(run, base, tmp_path, line, reason):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Who?"}\n' + line + "\n")
    code, out, err = run("--model", base, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "o.jsonl")
    assert (code, out) == (2, "")
    assert f"p.jsonl, {reason}" in err and err.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What does not go together, what is not there


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--web --prompt x", "--prompt and --web are 2 things to do: give one of them"),
        ("--prompts p --out o --merge m", "--prompts and --merge are 2 things to do"),
        ("--prompts p", "--prompts needs --out"),
        ("--out o", "--out needs --prompts or --latency"),
        ("--prompt x --batch_size 4", "--batch_size needs --prompts or --samples"),
        ("--port 80", "--port needs --web"),
        ("--host 0.0.0.0", "--host needs --web"),
        ("--compare", "--compare needs --adapter"),
        ("--samples 3 --temperature 1", "--samples needs --prompt or --prompts"),
        ("--prompt x --samples 3", "--samples needs --prompt or --prompts, and a --temperature above 0"),
        ("--prompt x --samples 0", "--samples must be at least 1, not 0"),
        ("--web --port 70000", "--port must be from 1 to 65535, not 70000"),
        ("--web --host example", "--host must be an address such as 127.0.0.1, not example"),
        ("--merge m --adapter a --adapter b", "--merge takes one adapter"),
        ("--adapter a --adapter b --save s", "--save writes a model without an adapter"),
    ],
)
def test_flags_that_do_not_go_together_end_with_code_2_and_one_line(run, argv, reason):
    code, out, err = run(*argv.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("generate.py: ") and reason in err


def test_a_run_that_is_not_finished_says_how_to_go_on(run, base, adapter):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).unlink()
    (base / "config.json").unlink()
    (base / "run.json").write_text('{"template": "alpaca"}')
    for flag, folder in (("--adapter", adapter), ("--model", base)):
        code, out, err = run(flag, folder, "--prompt", "x")
        assert (code, out) == (2, "")
        assert (
            err
            == f"generate.py: the run in {folder} is not finished: train.py --resume True --output_dir {folder} goes on with it\n"
        )


def test_a_run_that_names_no_template_is_asked_with_the_one_that_is_named(run, adapter):
    settings = json.loads((adapter / "run.json").read_text())
    del settings["template"]
    (adapter / "run.json").write_text(json.dumps(settings))
    code, out, err = run("--adapter", adapter, "--prompt", "x", "--max_new_tokens", 1)
    assert (code, out) == (2, "")
    assert "run.json does not say which template was trained: name it with --template" in err
    assert run("--adapter", adapter, "--prompt", "x", "--max_new_tokens", 1, "--template", "plain")[0] == 0
    assert "mine.json cannot be read" in run("--adapter", adapter, "--prompt", "x", "--template", "mine.json")[2]


def test_without_gradio_the_page_says_what_to_install(run, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "talking.web", raising=False)
    code, out, err = run("--model", base, "--web")
    assert (code, out, err) == (2, "", "generate.py: --web needs gradio: pip install gradio\n")


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def web():
    pytest.importorskip("gradio", reason="gradio is not installed")
    import talking.web

    return talking.web


@pytest.mark.live
def test_eight_threads_at_one_desk_are_each_answered_as_if_alone(web, voices):
    """Other voices, questions, seeds and lengths at once: a cache, a draw or a token in the wrong place would change a text."""
    desk, got = web.Desk(), {}
    asked = {n: (n % 2, f"Question {n}?", Sampling(max_new_tokens=15 + 5 * n, temperature=n / 4, seed=n)) for n in range(8)}

    def ask(n):
        who, question, how = asked[n]
        got[n] = "".join(Reply(voices[who], None, [(question, ["Yes."] * 2, 0)] * n, question, who, how, desk.take))

    threads = [threading.Thread(target=ask, args=(n,)) for n in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for n, (who, question, how) in asked.items():
        assert got[n] == said(voices[who], how, None, *[question, "Yes."] * n, question)
    assert len(set(got.values())) == 8


@pytest.mark.live
def test_the_desk_takes_turns_passes_errors_on_and_drops_who_leaves(web):
    desk, order, closed = web.Desk(), [], threading.Event()

    def count(name, n):
        try:
            for i in range(n):
                order.append(name)
                time.sleep(0.01)
                yield i
        finally:
            if name == "long":
                closed.set()

    def fails():
        yield 1
        raise DataError("no")

    long = desk.take(count("long", 10**6))
    assert next(long) == 0
    assert list(desk.take(count("short", 20))) == list(range(20))
    turns = "".join(name[0] for name in order)
    assert "ss" not in turns and "ll" not in turns[turns.index("s") : turns.rindex("s")]
    taken = desk.take(fails())
    assert next(taken) == 1
    with pytest.raises(DataError, match="no"):
        next(taken)
    long.close()
    assert closed.wait(5)
    assert list(desk.take(count("after", 3))) == [0, 1, 2]


@pytest.mark.live
def test_what_the_page_refuses_is_said_and_changes_nothing_of_what_was_said(web, voices, monkeypatch):
    """Regenerating with wrong settings once took the last turn away; an error of the model left the page busy."""
    warnings, request = [], type("Request", (), {"session_hash": "one"})
    monkeypatch.setattr(web.gr, "Warning", warnings.append)
    ask, regenerate = (function.fn for function in list(web.page(voices, GenerateConfig(web=True)).fns.values())[:2])
    turns, good = [("Where?", ["Here.", "There."], 0)], [3, 0.0, 0, 1.0, 0.0, 1.0, 0]

    def refused(of, box, system="", settings=good):
        *_, last = of(request, turns, box, system, *settings)
        assert last[0] == turns and not last[2]["interactive"] and last[3]["interactive"]
        return warnings.pop(), last[1]

    assert "--temperature 0 always takes the likeliest" in refused(regenerate, "typed", settings=[3, 0, 5, 1, 0, 1, 0])[0]
    assert refused(ask, "Who?", settings=[3, 0, 0, 1, 0, 1, None]) == ("seed is empty, and needs a number", "Who?")
    assert refused(ask, None) == ("there is nothing to answer", "")
    assert refused(ask, "a\ud83d") == ("the message is not UTF-8 text (character 2)", "a?")
    monkeypatch.setattr(web, "Reply", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert refused(regenerate, "typed") == ("out of memory", "typed")
    monkeypatch.undo()
    *_, last = regenerate(request, turns, "", None, *good)
    assert [question for question, *_ in last[0]] == ["Where?"] and last[0] != turns and last[0][0][2] == 1


@pytest.mark.live
def test_only_an_address_that_others_can_reach_is_warned_about_and_nothing_is_shared(web, voices, monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(web.gr.Blocks, "launch", lambda self, **how: launched.append(how))
    monkeypatch.setattr(web.threading.Event, "wait", lambda self, timeout=None: None)
    for host, warned in (("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("192.0.2.7", True)):
        web.serve(voices, GenerateConfig(web=True, host=host, port=7999))
        assert ("can use this page; it asks for no password" in capsys.readouterr().err) == warned
        assert (launched[-1]["server_name"].strip("[]"), launched[-1]["share"]) == (host, False)


@contextmanager
def served(*argv, host="127.0.0.1"):
    """The port of a page that a process of its own serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "generate.py",
        *map(str, argv),
        "--web",
        "--port",
        str(port),
        "--host",
        host.strip("[]"),
        "--device",
        "cpu",
    ]
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert f"http://{host}:{port} " in page.stdout.readline()
        yield port
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 130


@pytest.mark.live
def test_eight_people_at_one_page_each_get_their_own_answers(web, base, adapter, voices):
    """Over HTTP, each with a history: the second answer depends on what this one was told, and nobody else. And the page is on
    127.0.0.1 only: this machine's other addresses, of which 127.0.0.2 is one, refuse."""
    from gradio_client import Client

    rest = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    how = [{"max_new_tokens": 20 + n, **rest, "seed": n} for n in range(8)]
    got = {}

    def talk(n, port):
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        for question in (f"Who is {n}?", f"And where is {n}?"):
            got[n] = client.predict(question, "Be brief.", *how[n].values(), api_name="/ask")

    with served("--adapter", adapter) as port:
        threads = [threading.Thread(target=talk, args=(n, port)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        second = [sys.executable, "generate.py", "--model", str(base), "--web", "--port", str(port)]
        done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr == f"generate.py: port {port} of 127.0.0.1 is taken or not allowed: name another with --port\n"
    for n in range(8):
        sampling = Sampling(**how[n])
        for who, voice in enumerate(voices):
            first = said(voice, sampling, "Be brief.", f"Who is {n}?")
            second = said(voice, sampling, "Be brief.", f"Who is {n}?", first, f"And where is {n}?")
            chats = [part for part in got[n] if isinstance(part, list)]
            texts = ["".join(part["text"] for part in m["content"]) for m in chats[who]]
            assert [t.split() for t in texts] == [t.split() for t in (f"Who is {n}?", first, f"And where is {n}?", second)]


@pytest.mark.live
def test_the_page_opens_at_an_address_of_ipv6(web, base):
    import httpx

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with served("--model", base, host="[::1]") as port:
        assert httpx.get(f"http://[::1]:{port}/", timeout=60).status_code == 200


@pytest.mark.live
def test_who_comes_when_the_queue_is_full_is_told_and_nothing_goes_past_it_and_ctrl_c_ends_a_busy_page(web, endless):
    """60 questions whose answers do not end; `served` checks that the page ends with 130 when they are under way."""
    import httpx

    with served("--model", endless, "--max_new_tokens", 4000) as port:
        address = f"http://127.0.0.1:{port}"
        asking = next(d for d in httpx.get(f"{address}/config").json()["dependencies"] if d["api_name"] == "ask")
        data = [None, "Where?", "", 4000, 0, 0, 1, 0, 1, 0]
        join = {"data": data, "fn_index": asking["id"]}
        codes = [
            httpx.post(f"{address}/gradio_api/queue/join", json=join | {"session_hash": f"s{n}"}, timeout=60).status_code
            for n in range(60)
        ]
        accepted = web.TOGETHER + web.WAITING
        assert codes == [200] * accepted + [503] * (60 - accepted)
        for path in ("run/ask", "api/ask"):
            assert httpx.post(f"{address}/gradio_api/{path}", json={"data": data}).status_code == 404
        assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"x" * 99)}).status_code == 413
        assert httpx.get(f"{address}/gradio_api/file={ROOT / 'README.md'}").status_code == 403


class Browser:
    """Headless Chromium, with what a person does to the page."""

    def __init__(self, profile):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        quiet = "quic background-networking component-update sync gpu"
        for flag in ("headless", "no-sandbox", "no-first-run", *(f"disable-{what}" for what in quiet.split())):
            options.add_argument(f"--{flag}")
        options.add_argument("--window-size=1280,900")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def texts(self) -> list[list[str]]:
        """What stands in each column: questions and answers in turn, spaces evened out."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('.block.chat')].map(chat => [...chat.querySelectorAll('.message-content')]"
            ".map(message => message.innerText.trim().replace(/\\s+/g, ' ')))"
        )

    def button(self, name):
        return self.driver.find_element("xpath", f"//button[normalize-space()='{name}']")

    def until(self, holds):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 120).until(lambda _: holds())

    def outside(self, own: str) -> list[str]:
        """The addresses that the page at `own` fetched from elsewhere."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert any(params["documentURL"].startswith(own) for params in sent)
        urls = [params["request"]["url"] for params in sent if params["documentURL"].startswith(own)]
        return [url for url in urls if not url.startswith((own, "data:", "blob:"))]


@pytest.fixture
def browser(tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.driver.quit()


@pytest.mark.live
def test_in_a_browser_a_typed_question_is_answered_side_by_side(web, browser, tmp_path):
    """With the model that comes along and an adapter over it; the screenshot is in pytest's folder, to be looked at."""
    options = {"rank": 2, "alpha": 4, "dropout": 0.0, "rslora": False}
    model = add_lora(load_model(generate_module.TINY), **options)
    torch.manual_seed(1)
    for weight in lora_parameters(model).values():
        weight.data.normal_(std=0.05)
    to_names = partial(to_hf, config=model.config)
    save_adapter(model, tmp_path / "run", to_names, base_model=str(generate_module.TINY), **options)
    voices = load_voices(GenerateConfig(adapter=(str(tmp_path / "run"),), compare=True, device="cpu"))
    question = "Which animal does Pena Marmond keep?"
    expected = [[question, " ".join(said(voice, Sampling(max_new_tokens=40), None, question).split())] for voice in voices]
    assert expected[0] != expected[1] and all(answer for _, answer in expected)
    with served("--adapter", tmp_path / "run", "--max_new_tokens", 40) as port:
        browser.driver.get(f"http://127.0.0.1:{port}")
        browser.until(lambda: browser.all("textarea"))
        browser.all("textarea")[0].send_keys(question)
        browser.button("Send").click()
        browser.until(lambda: browser.texts() == expected)
        browser.until(lambda: browser.button("Send").is_enabled())
        assert all(re.search(r"^\d+ tokens, [\d.]+ tokens/s$", counts.text) for counts in browser.all(".block.counts"))
        assert browser.driver.save_screenshot(tmp_path / "page.png")
        browser.button("Regenerate").click()
        browser.until(lambda: browser.texts() == expected and browser.button("Send").is_enabled())
        browser.button("Undo").click()
        browser.until(lambda: browser.texts() == [[], []])
        assert browser.all("textarea")[0].get_attribute("value") == question
        browser.all("textarea")[0].send_keys("why " * 600, "\n")
        browser.until(lambda: "tokens and the model's window 512: nothing is left" in browser.driver.page_source)
        assert browser.outside(f"http://127.0.0.1:{port}") == []


@pytest.mark.live
def test_in_a_browser_stop_ends_an_answer_and_keeps_what_was_said(web, browser, endless):
    with served("--model", endless, "--max_new_tokens", 4000) as port:
        browser.driver.get(f"http://127.0.0.1:{port}")
        browser.until(lambda: browser.all("textarea"))
        browser.all("textarea")[0].send_keys("Where?\n")
        browser.until(lambda: "tokens/s" in browser.all(".block.counts")[0].text)
        assert not browser.button("Send").is_enabled()
        browser.button("Stop").click()
        browser.until(lambda: browser.button("Send").is_enabled())
        time.sleep(0.5)
        stopped = browser.texts()[0]
        time.sleep(1)
        assert browser.texts()[0] == stopped and browser.button("Send").is_enabled()
        assert int(browser.all(".block.counts")[0].text.split()[0]) < 4000
        browser.button("Undo").click()  # what was stopped is part of what was said
        browser.until(lambda: browser.texts() == [[]])
