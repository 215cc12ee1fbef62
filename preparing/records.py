"""Records: what a file of them says, recognised by their fields, as dialogs.

A reader (preparing/readers.py) yields a record and its place in the file. The first fields of this list that a record has decide
what it becomes, and which template its kind is written for:

    --source, --target, --system      whatever these flags name
    messages                          roles and contents as they are; what `data.py prepare` writes
    conversations, items              ShareGPT's "from" and "value"
    a pair of PAIRS                   a prompt and its reply, with an input where there is one
    text, input with markers          conversations written out as one text: guanaco's, human_bot's, Llama 2's
    text                              raw text

A field `system` is the system message of those of the middle three that have none of their own.
A record that is none of these, or not what it looks like, is an error with file, line and reason, never skipped in silence.
"""

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preparing.readers import DataError, reader_of


class Record(NamedTuple):
    dialog: list[dict]
    kind: str  # the template that records with these fields are written for
    origin: str  # file and line; or, of a prepared record, where it was before


def parse_input(given: str) -> tuple[Path, float]:
    """(path, weight) of a file as it is named on the command line: a.jsonl, or a.jsonl:2 to see its records twice as often.
    A name of a dataset, a file that is not there or one of an unknown kind is refused before anything is read."""
    path, weight = Path(given), 1.0
    if not path.exists() and (weighted := re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", given)):
        path, weight = Path(weighted[1]), float(weighted[2])
    if not 0 < weight <= 10**6:
        raise DataError(f"{given}: a weight is above 0 and at most 1,000,000")
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

    `source` and `target` name the fields of prompt and reply, `system` a third for a system message; without them a record is
    recognised by its fields. parse, if given, makes the dialog in the place of dialog_of.
    A bad record raises DataError with file, place and reason; or, if `refuse` is given, it is called with these and reading
    goes on. A file that cannot be read to its end raises in any case."""
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


KINDS = {*_FLAT, *(kind for kind, *_ in PAIRS)}  # each is the name of a template


def dialog_of(record, source: str | None, target: str | None, system: str | None) -> tuple[str, list[dict]]:
    """(kind, dialog) of a record, by its fields."""
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected a record with named fields, found {type(record).__name__}")

    def text(field):
        here = ", ".join(map(str, record))
        if field not in record:
            raise DataError(f"there is no field {field!r}; fields here: {here}")
        if not isinstance(record[field], str):
            found = "nothing" if record[field] is None else type(record[field]).__name__
            raise DataError(f"field {field!r} should hold text and holds {found}; fields here: {here}")
        return record[field]

    def holds(field):  # something, which then has to be text
        return record.get(field) not in (None, "")

    def pair(prompt, reply, before=None, **more):
        first = [{"role": "system", "content": text(before)}] if before and holds(before) else []
        return [*first, {"role": "user", "content": text(prompt), **more}, {"role": "assistant", "content": text(reply)}]

    def conversation(turns, field):
        dialog = _checked_messages(turns, field)
        apart = holds("system") and dialog[0]["role"] != "system"
        return [{"role": "system", "content": text("system")}, *dialog] if apart else dialog

    if source is not None:
        if system is not None:
            text(system)
        return "llama2", pair(source, target, system)
    if "messages" in record:  # no_robots, and what `prepare` writes
        kind = record.get("kind")
        return kind if isinstance(kind, str) and kind in KINDS else "llama2", conversation(record["messages"], "messages")
    for field in ("conversations", "items"):  # ShareGPT, openchat_sharegpt4
        if field in record:
            turns = record[field]
            if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
                turns = [(t, t.get("from", t.get("role")), t.get("value", t.get("content"))) for t in turns]
                turns = [t | {"role": _ROLES.get(str(role), role), "content": content} for t, role, content in turns]
            return "llama2", conversation(turns, field)
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
            if record.get("history"):  # LLaMA-Factory's
                raise DataError("field 'history' holds earlier turns: write such a conversation as messages")
            more = {"input": text(extra)} if holds(extra) else {}
            return kind, pair(prompt, reply, next(filter(holds, (*before, "system")), None), **more)
    for field in ("text", "input"):
        for kind, marker in _FLAT.items() if isinstance(record.get(field), str) else ():
            parts = marker.split(record[field].strip())
            if len(parts) > 1 and not parts[0]:  # openassistant-guanaco, h2ogpt-oig-oasst1: ["", role, content, role, ...]
                roles = [_ROLES[role.lower()] for role in parts[1::2]]
                turns = [{"role": r, "content": c.strip()} for r, c in zip(roles, parts[2::2], strict=True)]
                if len(turns) > 1 and turns[-1] == {"role": "user", "content": ""}:
                    del turns[-1]  # "<human>:" at the end only says that the reply is over
                return kind, _checked_messages(turns, field)
    if isinstance(record.get("text"), str) and (turns := _llama2_turns(record["text"])):
        return "llama2", _checked_messages(turns, "text")
    if "text" in record:
        return "text", [{"role": "text", "content": text("text")}]
    raise DataError(
        f"no known fields among {', '.join(map(str, record)) or '(none)'}: known are messages; instruction, input, output; "
        "prompt, response; text; or name two with --source and --target (README.md lists all)"
    )


def _llama2_turns(text: str) -> list[dict]:
    """The messages of a text that is written out for Llama 2 already, "<s>[INST] question [/INST] reply </s>...", else none:
    learned as it stands, its <s> and </s> would be letters."""
    before, *parts = re.split(r"(?:<s>)?\s*\[INST\]", text)
    if before.strip() or not parts:
        return []
    turns = []
    for part in parts:
        user, _, reply = part.partition("[/INST]")
        if not turns and (system := re.fullmatch(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", user, re.S)):
            turns, user = [{"role": "system", "content": system[1].strip()}], system[2]
        turns.append({"role": "user", "content": user.strip()})
        if reply := reply.strip().removesuffix("</s>").strip():
            turns.append({"role": "assistant", "content": reply})
    return turns


def _checked_messages(messages, field: str = "messages") -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"field {field!r} should hold a list of messages and does not")
    expected = ("system", "user")
    for i, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in expected:
            raise DataError(f"message {i} has the role {role!a}, expected {' or '.join(expected)}")
        if lost := message.get("tool_calls") or message.get("function_call"):
            raise DataError(f"message {i} calls a tool, which no template writes: {str(lost)[:60]!a}")
        if role == "assistant" and message.get("weight") == 0:
            raise DataError(f"message {i} has weight 0, and here every reply of the assistant is learned: leave out the record")
        if not isinstance(content, str):
            raise DataError(f"message {i} should hold text in 'content' and holds {type(content).__name__}")
        expected = ("assistant",) if role == "user" else ("user",)
    if messages[-1]["role"] == "system":
        raise DataError("a system message alone is no conversation")
    return [
        {"role": m["role"], "content": m["content"]} | ({"input": m["input"]} if isinstance(m.get("input"), str) else {})
        for m in messages
    ]
