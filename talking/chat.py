"""Talking to what was trained: in the terminal, once or in turns, and to a whole file of prompts.

What was said is a list of turns, (question, [the reply of each voice], how often it was asked again): undo takes the last away,
regenerate asks its question once more, and several voices (the base, one or more adapters over it) each hear their own replies.
What the model sees is the same dialog, in the template it was trained with, less the oldest turns where the window is too small
for all of them."""

import json
import os
import re
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from data import DataError, encode_dialog
from generate import GenerateConfig, Sampling, answers, generate, text_stream
from helping.files import writing
from preparing.records import dialog_of, read_records
from talking.latency import report
from talking.merge import merge, save
from talking.voices import Voice

HELP = """/reset          forget what was said; the system message stays
/undo           forget the last question and its answer
/regenerate     answer the last question again, with another seed
/system TEXT    a system message before all that follows; without TEXT none
/help           this
/quit           the end, as Ctrl-D; Ctrl-C stops an answer"""


def pick(config: GenerateConfig):
    """What the flags ask for, a function of (voices, config); DataError if they ask for two things, or for half of one."""
    given = {name for name, field in GenerateConfig.__dataclass_fields__.items() if getattr(config, name) != field.default}
    doing = [f"--{name}" for name in ("prompt", "prompts", "web", "latency", "merge", "save") if name in given]
    if config.latency and config.prompt:
        doing.remove("--prompt")  # which is what it measures
    if len(doing) > 1:
        raise DataError(f"{' and '.join(doing)} are {len(doing)} things to do: give one of them")
    needed = {"prompts": "out", "port": "web", "host": "web", "compare": "adapter"}
    for name, need in needed.items():
        if name in given and need not in given:
            raise DataError(f"--{name} needs --{need}")
    if "batch_size" in given and not ({"prompts", "samples"} & given):
        raise DataError("--batch_size needs --prompts or --samples: they are answered several at a time")
    if config.out and not {"prompts", "latency"} & given:
        raise DataError("--out needs --prompts or --latency")
    for name, right, need in (
        ("batch_size", config.batch_size >= 1, "at least 1"),
        ("samples", config.samples >= 1, "at least 1"),
        ("port", 0 < config.port < 65536, "from 1 to 65535"),
        ("host", re.fullmatch(r"[0-9.]+|[0-9a-f:.]*:[0-9a-f:.]*", config.host), "an address such as 127.0.0.1"),
    ):
        if not right:
            raise DataError(f"--{name} must be {need}, not {getattr(config, name)}")
    if config.samples > 1 and (config.temperature == 0 or not {"prompt", "prompts"} & given):
        raise DataError("--samples needs --prompt or --prompts, and a --temperature above 0, or all answers would be the same")
    if config.merge and (config.compare or len(config.adapter) > 1):
        raise DataError("--merge takes one adapter")
    if config.save and config.adapter:
        raise DataError("--save writes a model without an adapter; --merge writes an adapter and its base as one")
    if config.save and config.quantize == "int8":
        raise DataError("--save has no layout for int8: take --quantize nf4, or none")
    for flag, text in (("prompt", config.prompt), ("system", config.system), *(("stop", text) for text in config.stop)):
        check_text(text or "", f"--{flag}")
    for flag in ("merge", "save"):
        if flag in given and Path(getattr(config, flag)).exists():
            raise DataError(f"--{flag} {getattr(config, flag)} exists already: name a new folder")
    if config.merge or config.save:
        return merge if config.merge else save
    if config.latency:
        return report
    if config.web:
        from talking.web import serve  # gradio takes seconds to import

        return serve
    return answer_file if config.prompts else chat if config.prompt is None else ask


# ---------------------------------------------------------------------------------------------------------------------
# One reply


def fit(dialog: list[dict], voice: Voice, max_new_tokens: int) -> tuple[list[int], int]:
    """A dialog that ends on a question as (its token ids, how many of the oldest turns are left out of them).

    As many are as it takes for max_new_tokens to fit the window behind the rest. The system message and the last question
    stay: if these alone are too long the answer is cut at the window, or refused by generate if none would fit."""
    system = dialog[: dialog[0]["role"] == "system"]
    window = voice.model.config.max_seq_len
    for cut in range(len(system), len(dialog), 2):  # a turn is two messages
        ids, _ = encode_dialog([*system, *dialog[cut:]], voice.tokenizer, voice.template)
        if len(ids) + max_new_tokens <= window:
            break
    return ids, cut // 2


class Reply:
    """The answer of one voice to a question, as an iterable of pieces of text; what is counted grows on the way.

    `through` is handed the stream of tokens and gives it back, perhaps from another thread."""

    def __init__(self, voice: Voice, system: str | None, turns: list, question: str, who: int, sampling: Sampling, through=iter):
        dialog = [{"role": "system", "content": system}] if system else []
        for asked, replies, _ in [*turns, (question, None, 0)]:
            dialog.append({"role": "user", "content": asked})
            if replies:
                dialog.append({"role": "assistant", "content": replies[who]})
        self.prompt, self.left_out = fit(dialog, voice, sampling.max_new_tokens)
        self.voice, self.window = voice, voice.model.config.max_seq_len
        self.stop = (*voice.template.stop, *sampling.stop)
        self.stream = through(generate(voice.model, self.prompt, sampling, stop_tokens=(voice.tokenizer.eos_id,), keep=True))
        self.text, self.tokens, self.seconds = "", 0, 0.0

    def __iter__(self):
        started = time.perf_counter()

        def counted():
            for token in self.stream:
                self.tokens += 1
                self.seconds = time.perf_counter() - started
                yield token

        with closing(self.stream):  # an answer that ends on a stop string leaves the model to others at once
            for piece in text_stream(self.voice.tokenizer, counted(), self.stop):
                self.text += piece
                yield piece

    def __str__(self):
        line = f"{self.tokens} tokens, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        if self.left_out:
            line += f"; {self.left_out} of the oldest turns left out, to fit the window of {self.window} tokens"
        return line


def check_text(text: str, where: str) -> str:
    """What came in, if it was UTF-8: Python hands bytes that are not over as halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not UTF-8 text (character {error.start + 1})") from None
    return text


def note(text: str) -> None:
    """What is not the answer itself goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_replies(voices: list[Voice], system, turns, question, sampling: Sampling, texts: list[str]) -> bool:
    """Every voice's answer, printed as it comes, with its name above it if there are several, and put into its place in texts.
    True if Ctrl-C stopped them: what was said until then counts as the answer."""
    for who, voice in enumerate(voices):
        reply = Reply(voice, system, turns, question, who, sampling)
        if len(voices) > 1:
            print(f"--- {voice.name}")
        try:
            for piece in reply:
                texts[who] += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            note(f"\n[stopped; {reply}]")
            return True
        print(flush=True)
        note(f"[{reply}]")
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The terminal


def ask(voices: list[Voice], config: GenerateConfig) -> None:
    """--prompt: one question, answered by every voice, or --samples times by each."""
    if config.samples == 1:
        if print_replies(voices, config.system, [], config.prompt, config, [""] * len(voices)):
            sys.exit(130)
        return
    for voice in voices:
        prompt = Reply(voice, config.system, [], config.prompt, 0, config).prompt
        for first in range(0, config.samples, config.batch_size):  # as many together as memory is taken to hold
            streams = range(first, min(first + config.batch_size, config.samples))
            for n, (text, _) in zip(streams, answers(*voice[1:], [prompt] * len(streams), config, streams), strict=True):
                print(f"--- {f'{voice.name}, ' if len(voices) > 1 else ''}{n + 1} of {config.samples}\n{text}")


def chat(voices: list[Voice], config: GenerateConfig) -> None:
    """A conversation, a line a question, until the end of the input. In a terminal a mistake is said and the chat goes on; what
    comes through a pipe is a script, which a mistake ends."""
    if sys.stdin is None:
        raise DataError("a chat needs a standard input, and it is closed: ask by --prompt or --prompts")
    live = sys.stdin.isatty()
    if live:
        import readline  # noqa: F401  arrows and history for input()
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # -sig: without the mark a file may begin with
    note(f"{' and '.join(voice.name for voice in voices)}, a window of {voices[0].model.config.max_seq_len} tokens; /help")
    system, turns, number = config.system, [], 0
    while True:
        earlier = turns
        try:
            line, number = input("> " if live else ""), number + 1
            word, _, rest = check_text(line, f"line {number} of the input").strip().partition(" ")
            if word == "/quit":
                return
            elif word == "/help":
                print(HELP)
            elif word == "/reset":
                turns = []
            elif word == "/system":
                system = rest.strip() or None
            elif word in ("/undo", "/regenerate") and not turns:
                note("(nothing was said yet)")
            elif word == "/undo":
                note(f"(forgotten: {turns.pop()[0]})")
            elif word.startswith("/") and word != "/regenerate":
                raise DataError(f"unknown command {word}: known are /reset, /undo, /regenerate, /system, /help, /quit")
            elif word:
                question, before, tries = line.strip(), turns, 0
                if word == "/regenerate":
                    question, before, tries = turns[-1][0], turns[:-1], turns[-1][2] + 1
                    if config.temperature == 0:
                        note("(at --temperature 0 the likeliest answer, again)")
                sampling = replace(config, seed=config.seed + tries)
                texts = [""] * len(voices)
                turns = [*before, (question, texts, tries)]  # now: a second Ctrl-C may come at any moment
                if print_replies(voices, system, before, question, sampling, texts) and not live:
                    sys.exit(130)
        except EOFError:
            return
        except (DataError, KeyboardInterrupt) as error:
            if not live:
                raise
            if isinstance(error, DataError):
                turns = earlier  # refused, not asked
            note(f"({error})" if str(error) else "\n(Ctrl-D or /quit ends)")


# ---------------------------------------------------------------------------------------------------------------------
# A file of prompts


def prompt_of(record, *names) -> tuple[str, list[dict]]:
    """(kind, dialog up to the question) of a record: {"prompt": ...}, or any that can train, less its last reply."""
    if isinstance(record, dict) and isinstance(record.get("prompt"), str) and not record.keys() & {"messages", "response"}:
        return "llama2", [{"role": "user", "content": record["prompt"]}]
    kind, dialog = dialog_of(record, *names)
    dialog = dialog[: len(dialog) - (dialog[-1]["role"] == "assistant")]
    if dialog[-1]["role"] != "user":
        raise DataError("raw text asks nothing")
    return kind, dialog


def written(job: dict, text: str) -> bytes:
    """The line of --out for an answer. Half a character, in the name of a file, is escaped as JSON does."""
    line = job | {"messages": [*job["messages"], {"role": "assistant", "content": text}]}
    return json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def answer_file(voices: list[Voice], config: GenerateConfig) -> None:
    """--prompts: answer every record of a file, in its order, and write a line for each to --out.

    A line holds the dialog with its answer as `messages` (so that it can be looked at, and trained on, as any data), `index`
    of the prompt from 0, `sample`, `by` (the voice), `sampling` and `provenance`. A run that was killed goes on behind the
    last whole line, and what is there must answer the same prompts in the same way."""
    records = list(read_records(config.prompts, parse=prompt_of))
    system = [{"role": "system", "content": config.system}] if config.system else []
    jobs = []
    settings = {name: value for name, value in asdict(config).items() if name in Sampling.__dataclass_fields__}
    for voice in voices:
        for index, record in enumerate(records):
            dialog = record.dialog if record.dialog[0]["role"] == "system" else [*system, *record.dialog]
            ids, _ = encode_dialog(dialog, voice.tokenizer, voice.template)
            if len(ids) >= voice.model.config.max_seq_len:
                raise DataError(
                    f"{record.origin}: the prompt has {len(ids)} tokens and the model's window "
                    f"{voice.model.config.max_seq_len}: nothing is left for an answer"
                )
            for sample in range(config.samples):
                line = {"index": index, "sample": sample, "by": voice.name, "provenance": record.origin}
                jobs.append((voice, ids, line | {"sampling": json.loads(json.dumps(settings)), "messages": dialog}))

    path, other = Path(config.out), "is not an answer to these prompts with these flags: name a new --out"
    with writing(path), open(path, "ab+") as file:
        file.seek(0)
        *there, rest = file.read().split(b"\n")
        for number, (line, (_, _, job)) in enumerate(zip(there, jobs, strict=False), start=1):
            try:
                found = json.loads(line)
                found["messages"].pop()
                same = all(found[name] == job[name] for name in job)
            except (ValueError, LookupError, TypeError, AttributeError):
                same = False
            if not same:
                raise DataError(f"{path}, line {number} {other}")
        if rest and len(there) < len(jobs):  # nothing of a file that is not ours is cut off
            begun = written(jobs[len(there)][2], "").removesuffix(b'"}]}\n')
            if not (rest.startswith(begun) or begun.startswith(rest)):
                raise DataError(f"{path}, line {len(there) + 1} {other}")
        if (lines := len(there) + bool(rest)) > len(jobs):
            raise DataError(f"{path} has {lines} lines, and there are {len(jobs)} answers to give: name a new --out")
        file.truncate(sum(len(line) + 1 for line in there))  # a line that was cut short is answered again
        if there:
            note(f"{len(there)} of {len(jobs)} answers are there already")
        started, done, tokens = time.perf_counter(), len(there), 0
        while done < len(jobs):
            voice = jobs[done][0]
            batch = [job for job in jobs[done : done + config.batch_size] if job[0] is voice]
            streams = [job["sample"] for _, _, job in batch]
            replies = answers(*voice[1:], [ids for _, ids, _ in batch], config, streams)
            for (_, _, job), (text, count) in zip(batch, replies, strict=True):
                file.write(written(job, text))
                tokens += count
            file.flush()
            os.fsync(file.fileno())
            done += len(batch)
            note(f"{done} of {len(jobs)} answered, {tokens / (time.perf_counter() - started):.1f} tokens/s")
