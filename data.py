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

    python data.py show mine.jsonl          the tokens as the model will see them
    python data.py stats mine.jsonl         lengths, shares, duplicates, how full the rows will be
    python data.py prepare mine.jsonl --out train.jsonl --split 0.02          what preparing/stages.py does

As the file about what a user hands in, it also holds `parse_flags`, the one way every script here reads its command line.
"""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import sys
import types
import typing
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

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

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return self.pieces.encode(texts)  # one call for many texts: no crossing into C++ and back for each

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < self.vocab_size])  # rows that only pad a model's table write nothing

    def save(self, folder, window: int) -> None:
        """Write tokenizer.model, and tokenizer_config.json, by which transformers puts <s> before a text as it should be."""
        (Path(folder) / "tokenizer.model").write_bytes(self.pieces.serialized_model_proto())
        about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        about |= {"add_bos_token": True, "add_eos_token": False, "model_max_length": window}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(about, indent=2))


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
    user_with_input: str = ""  # for records that have a separate input (Alpaca's); if empty, `user` and the input below it
    default_system: str = ""
    default_system_with_input: str = ""
    bos_every_turn: bool = False  # Meta's chat code writes <s> once per question and answer, the others once per document
    stop: tuple[str, ...] = ()  # generation ends when one of these is written, beside the end token


_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."

TEMPLATES = {
    "llama2": Template(
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        user="[INST] {system}{user} [/INST]",
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
    "human_bot": Template(user="{system}<human>: {user}\n<bot>:", assistant="{assistant}\n", stop=("<human>:",)),
    "guanaco": Template(user="{system}### Human: {user}### Assistant:", stop=("### Human:",)),
    "functions": Template(system="<FUNCTIONS>{system}</FUNCTIONS>\n\n", user="{system}[INST] {user} [/INST]\n\n"),
}


def load_template(name: str) -> tuple[Template, str]:
    """The template of that name, or a user's own: a JSON file (a name that ends in .json) or the JSON itself.

    Returns the template and what run.json keeps to find it again: the name, or for a user's own the JSON, which travels with
    the run. Raises DataError for an unknown name, and for a file that would write something else than the dialog."""
    if name in TEMPLATES:
        return TEMPLATES[name], name
    if not name.startswith("{") and not name.endswith(".json"):
        raise DataError(f"unknown template {name!r}: known are {', '.join(TEMPLATES)}, or a JSON file of your own")
    from preparing.readers import own_template  # here, as it imports this file

    return own_template(name)


class Piece(typing.NamedTuple):
    """What is tokenised in one go."""

    text: str
    begins: bool  # opened by <s>
    reply: bool  # learned, and ended by </s>


def write_dialog(dialog: list[dict], template: Template) -> list[Piece]:
    """A dialog as the texts that are tokenised one by one, so that what a user writes can never move the border of a reply.

    Messages lose the white space around them, as Meta's own chat code does: it would be learned as part of the reply.
    A dialog that ends on a user turn ends where the reply would begin: the prompt of generate.py."""
    if dialog[0]["role"] == "text":
        return [Piece(dialog[0]["content"], True, True)]
    given, turns = "", dialog
    if dialog[0]["role"] == "system":
        given, turns = dialog[0]["content"].strip(), dialog[1:]
    pieces = []
    for i, message in enumerate(turns):
        content = message["content"].strip()
        if message["role"] == "assistant":
            pieces.append(Piece(template.assistant.format(assistant=content), False, True))
            continue
        extra = message.get("input", "").strip()
        system = given or (template.default_system_with_input if extra else template.default_system) if i == 0 else ""
        if extra and not template.user_with_input:
            content = f"{content}\n\n{extra}"
        written = (template.user_with_input if extra and template.user_with_input else template.user).format(
            system=template.system.format(system=system) if system else "", user=content, input=extra
        )
        pieces.append(Piece(written, i == 0 or template.bos_every_turn, False))
    return pieces


def encode_dialog(dialog: list[dict], tokenizer: Tokenizer, template: Template, train_on_inputs: bool = False):
    """A dialog as (ids, labels), two lists of the same length; labels are ids where the model learns and -100 elsewhere.

    Every assistant turn is learned, its end token included; with train_on_inputs everything is, as raw text always is."""
    pieces = write_dialog(dialog, template)
    return _joined(pieces, tokenizer.encode_all([piece.text for piece in pieces]), tokenizer, train_on_inputs)


def _joined(pieces: list[Piece], encoded: list[list[int]], tokenizer: Tokenizer, train_on_inputs: bool):
    ids, labels = [], []
    for piece, tokens in zip(pieces, encoded, strict=True):
        tokens = [tokenizer.bos_id] * piece.begins + tokens + [tokenizer.eos_id] * piece.reply
        ids += tokens
        labels += tokens if piece.reply or train_on_inputs else [IGNORE] * len(tokens)
    return ids, labels


# ---------------------------------------------------------------------------------------------------------------------
# Records


class Record(typing.NamedTuple):
    dialog: list[dict]
    kind: str  # the template that records with these fields are written for
    origin: str  # file and line; or, of a prepared record, where it was before


def parse_input(given: str) -> tuple[Path, float]:
    """(path, weight) of a file as it is named on the command line: a.jsonl, or a.jsonl:2 to see its records twice as often.
    A name of a dataset, a file that is not there or one of an unknown kind is refused before anything is read."""
    from preparing.readers import reader_of  # here, as it imports this file

    path, weight = Path(given), 1.0
    if not path.exists() and (weighted := re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", given)):
        path, weight = Path(weighted[1]), float(weighted[2])
    if weight == 0:
        raise DataError(f"{given}: a weight is above 0")
    reader_of(path)
    return path, weight


def copies(weight: float, number: int, seed: int) -> int:
    """How often record `number` of a file is seen: 2 or 3 times for a weight of 2.5, by chance, always alike for a seed."""
    part = weight % 1
    return int(weight) + bool(part and np.random.default_rng((seed, number)).random() < part)


def read_dialogs(path, source: str | None = None, target: str | None = None, system: str | None = None):
    """Yield the dialogs of a file, in order. Raises DataError with the file, the line and the reason for the first bad record."""
    for record in read_records(path, source, target, system):
        yield record.dialog


def read_records(path, source: str | None = None, target: str | None = None, system: str | None = None, refuse=None, parse=None):
    """Yield the Records of a JSONL, JSON, CSV, parquet or text file, in order; all but JSON are streamed, .gz is unpacked.

    A record is recognised by its fields (dialog_of lists them). `source` and `target` name two other fields for prompt and
    reply, `system` a third for a system message. A .txt file is raw text, a document a paragraph.
    parse, if given, makes the dialog in the place of dialog_of.
    A bad record raises DataError with file, place and reason; or, if `refuse` is given, it is called with these and reading
    goes on. A file that cannot be read to its end raises in any case."""
    from preparing.readers import reader_of

    path = Path(path)
    reader = reader_of(path)
    if (source is None) != (target is None):
        raise DataError("--source and --target name two fields together: give both or neither")
    if system is not None and source is None:
        raise DataError("--system names the field of a system message beside --source and --target: give these too")
    empty = True
    try:
        for where, found in reader(path):
            empty = False
            try:
                kind, dialog = (parse or dialog_of)(found, source, target, system)
                for message in dialog:
                    "".join(message.values()).encode()  # JSON can spell half a character (\ud83d), which no tokenizer takes
            except (DataError, UnicodeEncodeError) as error:
                if isinstance(error, UnicodeEncodeError):
                    error = f"holds half a character, {error.object[error.start]!a}"
                if refuse is None:
                    raise DataError(f"{path}, {where}: {error}") from None
                refuse(f"{path}, {where}: {error}")
                continue
            origin = found.get("provenance")
            origin = origin if isinstance(origin, str) else f"{path.name}, {where}"
            yield Record(dialog, kind, origin.encode(errors="replace").decode())
    except (OSError, EOFError, zlib.error) as error:  # gzip's own errors have no strerror
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if empty:
        raise DataError(f"{path} holds no record")


# Conversations written out as one text: human_bot's markers count at the beginning of a line only, guanaco's anywhere. Such a
# file cannot say whether a marker is its own or a user's; the other schemas can, and `prepare` writes `messages`.
_FLAT = {"guanaco": re.compile(r"### (Human|Assistant):"), "human_bot": re.compile(r"^<(human|bot)>:", re.M)}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "system": "system"}


PAIRS = (  # template, prompt, reply, a system message if there is one, an input if there is one
    ("functions", "userPrompt", "assistantResponse", ("functionList", "systemPrompt"), None),
    ("plain", "alpaca_prompt", "response", (), None),  # open-instruct: the prompt is written out already
    ("alpaca", "instruction", "output", (), "input"),  # Alpaca, Open-Platypus
    ("alpaca", "question", "answer", (), "references"),
    ("llama2", "question", "response", ("system_prompt",), None),  # OpenOrca
    ("llama2", "prompt", "response", (), None),
)


def dialog_of(record, source: str | None, target: str | None, system: str | None) -> tuple[str, list[dict]]:
    """(kind, dialog) of a record, by its fields."""
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected a record with named fields, found {type(record).__name__}")

    def text(field):
        if not isinstance(record.get(field), str):
            found = "nothing" if record.get(field) is None else type(record[field]).__name__
            raise DataError(f"field {field!r} should hold text and holds {found}; fields here: {', '.join(map(str, record))}")
        return record[field]

    def pair(prompt, reply, before=None, **more):
        first = [{"role": "system", "content": text(before)}] if before and record.get(before) else []
        return [*first, {"role": "user", "content": text(prompt), **more}, {"role": "assistant", "content": text(reply)}]

    if source is not None:
        if system is not None:
            text(system)
        return "llama2", pair(source, target, system)
    if "messages" in record:  # no_robots, and what `prepare` writes
        kind = record.get("kind")
        return kind if isinstance(kind, str) and kind in TEMPLATES else "llama2", _checked_messages(record["messages"])
    for field in ("conversations", "items"):  # ShareGPT, openchat_sharegpt4
        if field in record:
            turns = record[field]
            if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
                turns = [{"role": _ROLES.get(str(t.get("from")), t.get("from")), "content": t.get("value")} for t in turns]
            return "llama2", _checked_messages(turns, field)
    if "instances" in record:  # Alpaca's seed tasks
        one = record["instances"]
        if not isinstance(one, list) or len(one) != 1 or not isinstance(one[0], dict):
            raise DataError("field 'instances' should hold a list of one {input, output} and does not")
        record = record | one[0]
    if isinstance(record.get("references"), list):  # webglm-qa: its answers cite [1], [2], ...
        if not all(isinstance(reference, str) for reference in record["references"]):
            raise DataError("field 'references' should hold a list of texts and does not")
        record = record | {"references": "\n\n".join(f"[{i}] {r}" for i, r in enumerate(record["references"], start=1))}
    for kind, prompt, reply, before, extra in PAIRS:
        if prompt in record and reply in record:
            more = {"input": text(extra)} if record.get(extra) else {}
            return kind, pair(prompt, reply, next((field for field in before if record.get(field)), None), **more)
    for field in ("text", "input"):
        for kind, marker in _FLAT.items() if isinstance(record.get(field), str) else ():
            parts = marker.split(record[field].strip())
            if len(parts) > 1 and not parts[0]:  # openassistant-guanaco, h2ogpt-oig-oasst1: ["", role, content, role, ...]
                roles = [_ROLES[role.lower()] for role in parts[1::2]]
                turns = [{"role": r, "content": c.strip()} for r, c in zip(roles, parts[2::2], strict=True)]
                if len(turns) > 1 and turns[-1] == {"role": "user", "content": ""}:
                    del turns[-1]  # "<human>:" at the end only says that the reply is over
                return kind, _checked_messages(turns, field)
    if "text" in record:
        return "text", [{"role": "text", "content": text("text")}]
    raise DataError(
        f"no known fields among {', '.join(map(str, record)) or '(none)'}: known are messages; instruction, input, output; "
        "prompt, response; text; or name two with --source and --target (README.md lists all)"
    )


def _checked_messages(messages, field: str = "messages") -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"field {field!r} should hold a list of messages and does not")
    expected = ("system", "user")
    for i, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in expected:
            raise DataError(f"message {i} has the role {role!a}, expected {' or '.join(expected)}")
        if not isinstance(content, str):
            raise DataError(f"message {i} should hold text in 'content' and holds {type(content).__name__}")
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] == "system":
        raise DataError("a system message alone is no conversation")
    return [
        {"role": m["role"], "content": m["content"]} | ({"input": m["input"]} if isinstance(m.get("input"), str) else {})
        for m in messages
    ]


def choose_template(kinds, asked: str | None) -> tuple[Template, str, str]:
    """(template, what run.json keeps of it, a word on why) for records of these kinds, unless one is asked for."""
    kinds = sorted({*kinds} - {"text"})  # raw text is raw text in any template
    if asked is not None:
        return *load_template(asked), "as asked"
    if len(kinds) > 1:
        return *load_template("llama2"), f"the records are of several kinds ({', '.join(kinds)}); --template names another"
    name = kinds[0] if kinds else "plain"
    return *load_template(name), "by the records' fields; --template names another" if kinds else "the records are raw text"


# ---------------------------------------------------------------------------------------------------------------------
# Documents and rows


def encode_documents(dialogs, tokenizer, template, *, max_length, too_long="cut", train_on_inputs=False, cache=None):
    """The dialogs that can train, as [(ids, labels)] int32 arrays of at most max_length tokens, and a Counter of their fates.

    too_long: "cut" keeps the first max_length tokens of a longer document, "drop" leaves it out. A record whose reply is
    empty, or cut away whole, has nothing to learn from and is left out. All is counted under the words that train.py prints.
    cache: a folder (cache_folder makes its name) in which the documents are kept, instead of in memory."""
    fates = Counter()
    if cache is None:
        return list(_encoded(dialogs, tokenizer, template, max_length, too_long, train_on_inputs, fates)), fates
    from preparing.cache import TokenFile, once, write_tokens  # here, as it imports this file

    encoded = _encoded(dialogs, tokenizer, template, max_length, too_long, train_on_inputs, fates)
    once(cache, lambda folder: write_tokens(folder, encoded, fates))
    return TokenFile(cache), Counter(json.loads((cache / "fates.json").read_text()))


def _encoded(dialogs, tokenizer, template, max_length, too_long, train_on_inputs, fates):
    dialogs = iter(dialogs)
    while batch := list(islice(dialogs, 256)):
        written = []
        for dialog in batch:
            if dialog[-1]["role"] == "user":
                dialog = dialog[:-1]  # an unanswered last turn teaches nothing
            if any(m["role"] in ("assistant", "text") and m["content"].strip() for m in dialog):
                written.append(write_dialog(dialog, template))
            else:
                fates["dropped, no reply"] += 1
        encoded = iter(tokenizer.encode_all([piece.text for pieces in written for piece in pieces]))
        for pieces in written:
            ids, labels = _joined(pieces, list(islice(encoded, len(pieces))), tokenizer, train_on_inputs)
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
            yield np.array(ids, np.int32), np.array(labels, np.int32)


def pack(sizes, row_tokens: int, order) -> list[array]:
    """Which documents, taken in this order, lie in which row. First fit: a document goes into the first of the latest 64 rows
    with room for it. On no_robots in the llama2 template, rows of 512 tokens end up 95 % full and rows of 2,048 tokens 99 %."""
    rows: list[array] = []
    room: list[int] = []
    for i in order:
        size = sizes[i]
        for row in range(max(0, len(rows) - 64), len(rows)):
            if room[row] >= size:
                break
        else:
            row = len(rows)
            rows.append(array("i"))
            room.append(row_tokens)
        rows[row].append(int(i))
        room[row] -= size
    return rows


def count_learned(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels[1:] != IGNORE))  # nothing predicts the first


class PackedBatches:
    """Documents packed into rows of exactly row_tokens tokens; every document is in exactly one row, whole.

    The packing is made once from the seed, and each epoch visits the rows in an order drawn from (seed, epoch). So batch
    (epoch, index) is a pure function of the seed: to resume, or to give every rank its share, is to ask for other indices."""

    def __init__(self, documents, row_tokens: int, seed: int = 0, shuffle: bool = True):
        self.documents, self.row_tokens, self.seed, self.shuffle = documents, row_tokens, seed, shuffle
        in_memory = not hasattr(documents, "sizes")  # a file of tokens knows both
        self.sizes = [len(ids) for ids, _ in documents] if in_memory else documents.sizes
        self.supervised = [count_learned(labels) for _, labels in documents] if in_memory else documents.supervised
        order = np.random.default_rng(seed).permutation(len(documents)) if shuffle else range(len(documents))
        self.rows = pack(self.sizes, row_tokens, order)
        self.order = None

    def __len__(self) -> int:
        return len(self.rows)

    def documents_in(self, epoch: int, index: int) -> array | list[int]:
        """Which documents row `index` of an epoch holds; none past the last row."""
        if index >= len(self.rows):
            return []
        if self.shuffle:
            if self.order is None or self.order[0] != epoch:  # drawn once an epoch: of a million rows it takes a while
                self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            index = self.order[1][index]
        return self.rows[index]

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
    classes = [kind for kind in config_class.__mro__ if dataclasses.is_dataclass(kind)]  # its own fields, then those it inherits
    for line in "".join(map(inspect.getsource, classes)).splitlines():
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


def with_tuples(settings: dict) -> dict:
    """argparse and JSON know lists only; a frozen dataclass holds tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _flag_kind(kind) -> dict:
    """argparse's options for a field of this type: bool, int, float, str, Literal choices, a tuple of strings, or X | None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "action": "extend", "metavar": "NAME", "type": str}  # --adapter a b, or --adapter a --adapter b
    if kind is bool:  # --resume, --resume True and --resume False
        return {"nargs": "?", "const": True, "metavar": "True|False", "type": _true_or_false}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}


def _true_or_false(text: str) -> bool:
    if text not in ("True", "False", "true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


STAGES = ("clean", "length", "quality", "against", "dedup", "select", "split", "mix")


@dataclass(frozen=True)
class DataConfig:
    # What is read
    source: str | None = None  # the field or column with the prompt, if it has a name of its own
    target: str | None = None  # the field or column with the reply
    system: str | None = None  # the field or column with a system message
    template: str | None = None  # how a dialog is written out: a name or a JSON file; by the records' fields if not given
    tokenizer: str = str(Path(__file__).resolve().parent / "tiny" / "tokenizer.model")  # SentencePiece file
    model_max_length: int = 512  # longest document in tokens: show and stats mark what is cut, prepare removes it
    seed: int = 42  # draws the order, the split, the copies
    # show
    n: int = 3  # records shown
    # stats
    plot: str | None = None  # a PNG of the lengths
    # prepare
    out: str | None = None  # the JSONL file to write; with --split also FILE.validation.jsonl
    stages: tuple[str, ...] = STAGES  # those that are on; select, split and against also need their own flag
    min_tokens: int = 0  # length: shorter records go
    near: float = 0.95  # dedup, split: share of the words that near-duplicates have in common
    dedup_on: Literal["whole", "reply"] = "whole"  # what is compared
    against: tuple[str, ...] = ()  # files of evaluation records: what shares 13 words in a row with one goes
    select: int = 0  # so many records are kept; 0: all
    select_by: Literal["longest", "diverse"] = "longest"  # by their replies
    split: float = 0.0  # share held out for validation
    overwrite: bool = False  # replace the file that --out names

    def __post_init__(self):
        for name, least, most in (("model_max_length", 1, 2**31), ("n", 1, 2**31), ("split", 0, 0.99), ("near", 0.3, 1)):
            if not least <= getattr(self, name) <= most:
                raise DataError(f"--{name} must be from {least} to {most}, not {getattr(self, name)}")
        if unknown := {*self.stages} - {*STAGES}:
            raise DataError(f"unknown stage {', '.join(sorted(unknown))}: known are {', '.join(STAGES)}")


def main():
    from preparing.pages import show, stats  # here, as they import this file
    from preparing.stages import prepare

    commands = {"show": show, "stats": stats, "prepare": prepare}
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character should not end the program
    words = sys.argv[1:]
    flags = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    try:
        given = parse_flags(DataConfig, "python data.py show|stats|prepare FILE... [--flag value ...]", words[flags:])
        if flags < 2 or words[0] not in commands:
            raise DataError("say show, stats or prepare, and the files: python data.py show mine.jsonl --template llama2 --n 3")
        config = DataConfig(**with_tuples(given))
        commands[words[0]](config, [parse_input(word) for word in words[1:flags]], Tokenizer(config.tokenizer))
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
    except (DataError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import data  # the module that preparing/ imports, not a second copy of it with a DataError of its own

    data.main()
