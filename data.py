"""Data: from a file of records to the fixed-shape rows of tokens that training reads.

    file  --read_records-->  dialogs  --encode_dialog-->  ids and labels  --PackedBatches-->  rows

A dialog is a list of messages, {"role": "system" | "user" | "assistant", "content": "..."}; raw text is one message of role
"text". A template says how a dialog is written out as text, and each piece is tokenised by itself, so it is known, not
searched for afterwards, which tokens are the reply. Only those train: labels repeat the ids where a token is supervised, and
are -100 elsewhere. With the llama2 template:

    ids      <s>  [INST]  Where ...  [/INST]   Mira  lives  in  Oakford  .  </s>
    labels   -100  -100    -100       -100     Mira  lives  in  Oakford  .  </s>      (roughly: [INST] is several tokens)

A row is `per_device_train_batch_size x model_max_length` tokens: whole documents end to end, no padding between them. Batches
padded to their longest record waste about half of the work on real data, where one reply has 20 tokens and the next 2,000.

    python data.py show mine.jsonl          the tokens as the model will see them
    python data.py stats mine.jsonl         lengths, shares, duplicates, how full the rows will be
    python data.py prepare mine.jsonl --out train.jsonl --split 0.02          what preparing/stages.py does

Each counts with the embedded model's tokenizer unless --tokenizer names your model's: the counts differ.

How a record is recognised by its fields is in preparing/records.py, the kinds of file in preparing/readers.py.
"""

import json
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from preparing.readers import DataError, added_tokens, own_template
from preparing.records import read_dialogs  # noqa: F401  a public door of this file

IGNORE = -100  # the label of a token that is read but not supervised; the value cross_entropy skips
PAD_ID = 0  # fills the tail of a row: Llama 2's <unk>, never the end token, and never supervised


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
        named = added_tokens(Path(path).parent)
        self.added = tuple(sorted(x for x in named if self.pieces.id_to_piece(self.pieces.piece_to_id(x)) != x))

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos  # once or, times False, not at all

    def added_in(self, *texts: str) -> str:
        """Which of the tokens that the model has beside tokenizer.model, such as <|im_start|>, stand in a text: for transformers
        each is one id, here it is spelt in pieces, as whatever a user writes is."""
        return " ".join(token for token in self.added if any(token in text for text in texts))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return self.pieces.encode(texts)  # one call for many texts: no crossing into C++ and back for each

    def decode(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i < self.vocab_size])  # rows that only pad a model's table write nothing

    def save(self, folder, window: int) -> None:
        """Write tokenizer.model, and tokenizer_config.json, by which transformers puts <s> before a text as it should be,
        and (legacy) SentencePiece's leading space behind every <s> and </s> that is written in it, not at the very first only."""
        (Path(folder) / "tokenizer.model").write_bytes(self.pieces.serialized_model_proto())
        about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        about |= {"add_bos_token": True, "add_eos_token": False, "legacy": True, "model_max_length": window}
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
    fields, text = own_template(name)
    return Template(**fields), text


class Piece(NamedTuple):
    """What is tokenised in one go."""

    text: str
    begins: bool  # opened by <s>
    reply: bool  # supervised, and ended by </s>


def write_dialog(dialog: list[dict], template: Template) -> list[Piece]:
    """A dialog as the texts that are tokenised one by one, so that what a user writes can never move the border of a reply.

    Messages lose the white space around them, as Meta's own chat code does: it would be learned as part of the reply.
    A dialog that ends on a user turn ends where the reply would begin: the prompt of generate.py. Raises DataError for a system
    message that a template of the user's own has no place for."""
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
        system = (given or (template.default_system_with_input if extra else template.default_system)) if i == 0 else ""
        if extra and not template.user_with_input:
            content = f"{content}\n\n{extra}"
        form = template.user_with_input if extra and template.user_with_input else template.user
        if system and "{system}" not in form:
            raise DataError(f"the template has no {{system}} where this system message would stand: {system[:60]!a}")
        before = template.system.format(system=system) if system else ""
        pieces.append(Piece(form.format(system=before, user=content, input=extra), i == 0 or template.bos_every_turn, False))
    return pieces


def encode_dialog(dialog: list[dict], tokenizer: Tokenizer, template: Template, train_on_inputs: bool = False):
    """A dialog as (ids, labels), two lists of the same length; labels are ids where the model learns and -100 elsewhere.

    Every assistant turn is supervised, its end token included; with train_on_inputs everything is, as raw text always is."""
    pieces = write_dialog(dialog, template)
    return _joined(pieces, tokenizer.encode_all([piece.text for piece in pieces]), tokenizer, train_on_inputs)


def _joined(pieces: list[Piece], encoded: list[list[int]], tokenizer: Tokenizer, train_on_inputs: bool):
    ids, labels = [], []
    for piece, tokens in zip(pieces, encoded, strict=True):
        tokens = [tokenizer.bos_id] * piece.begins + tokens + [tokenizer.eos_id] * piece.reply
        ids += tokens
        labels += tokens if piece.reply or train_on_inputs else [IGNORE] * len(tokens)
    return ids, labels


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


def has_reply(dialog: list[dict]) -> bool:
    """Whether there is anything to learn from it."""
    return any(m["role"] in ("assistant", "text") and m["content"].strip() for m in dialog)


def _encoded(dialogs, tokenizer, template, max_length, too_long, train_on_inputs, fates):
    dialogs = iter(dialogs)
    while batch := list(islice(dialogs, 256)):
        written = []
        for dialog in batch:
            if dialog[-1]["role"] == "user":
                dialog = dialog[:-1]  # an unanswered last turn teaches nothing
            if has_reply(dialog):
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
            if added := tokenizer.added_in(*(piece.text for piece in pieces)):
                fates[f"of these hold {added}, one token each for transformers, here spelt in pieces"] += 1
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


def count_supervised(labels: np.ndarray) -> int:
    return int(np.count_nonzero(labels[1:] != IGNORE))  # nothing predicts the first


class PackedBatches:
    """Documents packed into rows of exactly row_tokens tokens; every document is in exactly one row, whole.

    The packing is made once from the seed, and each epoch visits the rows in an order drawn from (seed, epoch). So batch
    (epoch, index) is a pure function of the seed: to resume, or to give every rank its share, is to ask for other indices."""

    def __init__(self, documents, row_tokens: int, seed: int = 0, shuffle: bool = True):
        self.documents, self.row_tokens, self.seed, self.shuffle = documents, row_tokens, seed, shuffle
        in_memory = not hasattr(documents, "sizes")  # a file of tokens knows both
        self.sizes = [len(ids) for ids, _ in documents] if in_memory else documents.sizes
        self.supervised = [count_supervised(labels) for _, labels in documents] if in_memory else documents.supervised
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
# The program


def main():
    from preparing.commands import answer  # here, as it imports this file

    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character should not end the program
    try:
        answer(sys.argv[1:], __doc__)
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
