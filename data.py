"""Data: from a file of records to the fixed-shape rows of tokens that training reads.

    file  --read_dialogs-->  dialogs  --encode_dialog-->  ids and labels  --PackedBatches-->  rows

A dialog is a list of messages, {"role": "system" | "user" | "assistant", "content": "..."}; raw text is one message of role
"text". A template says how a dialog is written out as text, and each piece is tokenised by itself, so it is known, not
searched for afterwards, which tokens are the reply. Only those train: labels repeat the ids where the model is to learn, and
are -100 elsewhere. With the llama2 template:

    ids      <s>  [INST]  Where ...  [/INST]   Mira  lives  in  Oakford  .  </s>
    labels   -100  -100    -100       -100     Mira  lives  in  Oakford  .  </s>

A row is `per_device_train_batch_size x model_max_length` tokens: whole documents end to end, no padding between them. Batches
padded to their longest record waste half of the work or more on real data, where one reply has 20 tokens and the next 2,000.

As the file about what a user hands in, it also holds `parse_flags`, the one way every script here reads its command line.
"""

import argparse
import csv
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

IGNORE = -100  # the label of a token that is read but not learned; the value cross_entropy skips
PAD_ID = 0  # fills the tail of a row: Llama 2's <unk>, never the end token, and never learned


class DataError(ValueError):
    """A file of records, a tokenizer or a template that cannot be used."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class Tokenizer:
    """Llama's SentencePiece model: text to ids and back. Unknown characters become their UTF-8 bytes, so nothing is lost.

    bos_id (<s>, 1) opens a document and eos_id (</s>, 2) ends a reply; neither is added unless asked for."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise DataError(f"no tokenizer at {path}: expected a SentencePiece tokenizer.model (--tokenizer FILE names another)")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise DataError(f"{path} is not a SentencePiece model, or it is cut short") from None
        self.vocab_size = self.pieces.vocab_size()
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(f"{path} has no begin and end tokens; a Llama tokenizer has <s> and </s>")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < self.vocab_size])  # rows that only pad a model's table write nothing


# ---------------------------------------------------------------------------------------------------------------------
# Templates: the one place that knows how a dialog is written out


@dataclass(frozen=True)
class Template:
    """How a dialog becomes text. A turn is `user` then `assistant`; `{system}` in the first user turn is filled by `system`.

    A reply is tokenised by itself, so it begins with SentencePiece's own leading space: "### Response:" is followed by
    " Paris" without a space being written here."""

    user: str = "{system}{user}"
    assistant: str = "{assistant}"
    system: str = "{system}\n\n"
    user_with_input: str = "{system}{user}\n\n{input}"  # for records that have a separate input (Alpaca's)
    default_system: str = ""
    default_system_with_input: str = ""
    bos_every_turn: bool = False  # Meta opens every turn of a chat with <s>, as every turn ends with </s>
    stop: tuple[str, ...] = ()  # generation ends when one of these is written, beside the end token


_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."

TEMPLATES = {
    "llama2": Template(
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        user="[INST] {system}{user} [/INST]",
        user_with_input="[INST] {system}{user}\n\n{input} [/INST]",
        assistant="{assistant} ",
        bos_every_turn=True,
    ),
    "alpaca": Template(
        user="{system}### Instruction:\n{user}\n\n### Response:",
        user_with_input="{system}### Instruction:\n{user}\n\n### Input:\n{input}\n\n### Response:",
        default_system=_ALPACA.format(""),
        default_system_with_input=_ALPACA.format(", paired with an input that provides further context"),
        stop=("### Instruction:",),
    ),
    "plain": Template(),
}


def encode_dialog(dialog: list[dict], tokenizer: Tokenizer, template: Template, train_on_inputs: bool = False):
    """A dialog as (ids, labels), two lists of the same length; labels are ids where the model learns and -100 elsewhere.

    Every assistant turn is learned, its end token included; with train_on_inputs everything is, as raw text always is.
    Messages lose the white space around them, as Meta's own chat code does: it would be learned as part of the reply.
    A dialog that ends on a user turn ends where the reply would begin: the prompt of generate.py."""
    if dialog[0]["role"] == "text":
        ids = tokenizer.encode(dialog[0]["content"], bos=True, eos=True)
        return ids, list(ids)
    given, turns = "", dialog
    if dialog[0]["role"] == "system":
        given, turns = dialog[0]["content"].strip(), dialog[1:]
    ids, labels = [], []
    for i, message in enumerate(turns):
        reply, content = message["role"] == "assistant", message["content"].strip()
        if reply:
            piece = tokenizer.encode(template.assistant.format(assistant=content), eos=True)
        else:
            extra = message.get("input", "").strip()
            system = given or (template.default_system_with_input if extra else template.default_system) if i == 0 else ""
            written = (template.user_with_input if extra else template.user).format(
                system=template.system.format(system=system) if system else "", user=content, input=extra
            )
            piece = tokenizer.encode(written, bos=i == 0 or template.bos_every_turn)
        ids += piece
        labels += piece if reply or train_on_inputs else [IGNORE] * len(piece)
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_dialogs(path, source: str | None = None, target: str | None = None):
    """Yield the dialogs of a JSONL, JSON, CSV or text file, in order.

    A record is recognised by its fields: `messages`; `instruction`, `output` and perhaps `input`; `prompt` and `response`;
    `text`. `source` and `target` name two other fields for prompt and reply. A .txt file is raw text, a document a paragraph.
    Raises DataError with the file, the line and the reason for the first record that is not right."""
    path = Path(path)
    readers = {".jsonl": _jsonl_records, ".json": _json_records, ".csv": _csv_records, ".txt": _txt_records}
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the files in it")
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of file {path.suffix or '(no ending)'!r}: known are {', '.join(readers)}")
    if (source is None) != (target is None):
        raise DataError("--source and --target name two fields together: give both or neither")
    empty = True
    try:
        for where, record in readers[path.suffix](path):
            empty = False
            try:
                dialog = _as_dialog(record, source, target)
                for message in dialog:
                    "".join(message.values()).encode()  # JSON can spell half a character (\ud83d), which no tokenizer takes
            except UnicodeEncodeError as error:
                raise DataError(f"{path}, {where}: holds half a character, {error.object[error.start]!a}") from None
            except DataError as error:
                raise DataError(f"{path}, {where}: {error}") from None
            yield dialog
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if empty:
        raise DataError(f"{path} holds no record")


def _lines(path: Path):
    """(number, text) of each line, Windows' endings made plain. Decoded singly, so that a bad byte is reported with its line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            yield number, text.replace("\r\n", "\n")


def _jsonl_records(path: Path):
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from None


def _json_records(path: Path):
    text = "".join(line for _, line in _lines(path))
    try:
        records = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _csv_records(path: Path):
    csv.field_size_limit(2**31 - 1)  # its own limit is 128 KB a field
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    line_num = 0  # where the last good record ended: an open quote swallows the rest of the file
    try:
        for record in reader:
            where = f"line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{path}, {where}: expected {len(reader.fieldnames)} columns ({', '.join(reader.fieldnames)})")
            yield where, record
            line_num = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, the record from line {line_num + 1}: not CSV: {error}") from None


def _txt_records(path: Path):
    paragraph, start = [], 1
    for number, line in [*_lines(path), (0, "")]:
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"line {start}", {"text": "".join(paragraph).strip()}
            paragraph = []


def _as_dialog(record, source: str | None, target: str | None) -> list[dict]:
    if not isinstance(record, dict):
        raise DataError(f"expected a record with named fields, found {type(record).__name__}")

    def text(field):
        if not isinstance(record.get(field), str):
            found = "nothing" if record.get(field) is None else type(record[field]).__name__
            raise DataError(f"field {field!r} should hold text and holds {found}; fields here: {', '.join(map(str, record))}")
        return record[field]

    def pair(prompt, reply, **more):
        return [{"role": "user", "content": text(prompt), **more}, {"role": "assistant", "content": text(reply)}]

    if source is not None:
        return pair(source, target)
    if "messages" in record:
        return _checked_messages(record["messages"])
    if "instruction" in record and "output" in record:
        return pair("instruction", "output", **({"input": text("input")} if record.get("input") else {}))
    if "prompt" in record and "response" in record:
        return pair("prompt", "response")
    if "text" in record:
        return [{"role": "text", "content": text("text")}]
    raise DataError(
        f"no known fields among {', '.join(map(str, record)) or '(none)'}: known are messages; instruction, input, output; "
        "prompt, response; text; or name two with --source and --target"
    )


def _checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise DataError("field 'messages' should hold a list of messages and does not")
    expected = ("system", "user")
    for i, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in expected:
            raise DataError(f"message {i} has the role {role!r}, expected {' or '.join(expected)}")
        if not isinstance(content, str):
            raise DataError(f"message {i} should hold text in 'content' and holds {type(content).__name__}")
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] == "system":
        raise DataError("a system message alone is no conversation")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


# ---------------------------------------------------------------------------------------------------------------------
# Documents and rows


def encode_documents(dialogs, tokenizer, template, *, max_length: int, too_long: str = "cut", train_on_inputs=False):
    """The dialogs that can train, as [(ids, labels)] int32 arrays of at most max_length tokens, and a Counter of their fates.

    too_long: "cut" keeps the first max_length tokens of a longer document, "drop" leaves it out. A record whose reply is
    empty, or cut away whole, has nothing to learn from and is left out. All is counted under the words that train.py prints."""
    documents, fates = [], Counter()
    for dialog in dialogs:
        if dialog[-1]["role"] == "user":
            dialog = dialog[:-1]  # an unanswered last turn teaches nothing
        if not any(m["role"] in ("assistant", "text") and m["content"].strip() for m in dialog):
            fates["dropped, no reply"] += 1
            continue
        ids, labels = encode_dialog(dialog, tokenizer, template, train_on_inputs)
        if len(ids) > max_length:
            if too_long == "drop":
                fates[f"dropped, longer than {max_length} tokens"] += 1
                continue
            ids, labels = ids[:max_length], labels[:max_length]
            if all(label == IGNORE for label in labels[1:]):
                fates[f"dropped, reply begins after {max_length} tokens"] += 1
                continue
            fates[f"of these cut to {max_length} tokens"] += 1
        fates["kept"] += 1
        documents.append((np.array(ids, np.int32), np.array(labels, np.int32)))
    return documents, fates


class PackedBatches:
    """Documents packed into rows of exactly row_tokens tokens; every document is in exactly one row, whole.

    The packing is made once from the seed, and each epoch visits the rows in an order drawn from (seed, epoch). So batch
    (epoch, index) is a pure function of the seed: to resume, or to give every rank its share, is to ask for other indices."""

    def __init__(self, documents, row_tokens: int, seed: int = 0, shuffle: bool = True):
        self.documents, self.row_tokens, self.seed, self.shuffle = documents, row_tokens, seed, shuffle
        order = np.random.default_rng(seed).permutation(len(documents)) if shuffle else range(len(documents))
        self.rows: list[list[int]] = []
        # First fit: a document goes into the first of the latest 64 rows with room for it. On no_robots in the
        # llama2 template, rows of 512 tokens end up 95 % full and rows of 2,048 tokens 99 %.
        room: list[int] = []
        for i in order:
            size = len(documents[i][0])
            for row in range(max(0, len(self.rows) - 64), len(self.rows)):
                if room[row] >= size:
                    break
            else:
                row = len(self.rows)
                self.rows.append([])
                room.append(row_tokens)
            self.rows[row].append(int(i))
            room[row] -= size

    def __len__(self) -> int:
        return len(self.rows)

    def documents_in(self, epoch: int, index: int) -> list[int]:
        """Which documents row `index` of an epoch holds; none past the last row."""
        if index >= len(self.rows):
            return []
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows)) if self.shuffle else range(len(self.rows))
        return self.rows[order[index]]

    def batch(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        """Row `index` of an epoch: tokens (T,) int64; labels (T,) int64, at each position the next token of the same document
        or -100; cu_seqlens int32, the documents' borders. Past the last row it is empty: nothing supervised, same shape."""
        tokens = np.full(self.row_tokens, PAD_ID, np.int64)
        labels = np.full(self.row_tokens, IGNORE, np.int64)
        borders = [0]
        for i in self.documents_in(epoch, index):
            document_ids, document_labels = self.documents[i]
            start, end = borders[-1], borders[-1] + len(document_ids)
            tokens[start:end] = document_ids
            labels[start : end - 1] = document_labels[1:]  # predict the next token; the last has none
            borders.append(end)
        if borders[-1] < self.row_tokens:
            borders.append(self.row_tokens)  # the unused tail is a document of its own
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        }


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_flags(config_class, description: str, argv: list[str] | None = None) -> dict:
    """The flags given on the command line, {name: value}, for a dataclass whose fields are the flags.

    The comment at the end of a field's line is its help; a comment on a line of its own opens a group. A flag or value that
    does not exist ends the program with code 2 and the known ones."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, usage="%(prog)s [--flag value ...]")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help lists every flag)\n")
    kinds = typing.get_type_hints(config_class)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    group = parser
    for line in inspect.getsource(config_class).splitlines():
        if title := re.match(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif (flag := re.match(r"    (\w+): [^#]*(?:# (.*))?", line)) and flag[1] in kinds:
            name, text = flag[1], (flag[2] or "").replace("%", "%%")
            if defaults[name] not in (None, (), dataclasses.MISSING):
                shown = " ".join(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
                text += f" [{shown}]"
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **_flag_kind(kinds[name]))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [f"--{name}" for name in defaults], n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else ""))
    return vars(given)


def _flag_kind(kind) -> dict:
    """argparse's options for a field of this type: bool, int, float, str, Literal choices, a tuple of strings, or X | None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "NAME", "type": str}
    if kind is bool:  # --resume, --resume True and --resume False
        return {"nargs": "?", "const": True, "metavar": "True|False", "type": _true_or_false}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _true_or_false(text: str) -> bool:
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"
