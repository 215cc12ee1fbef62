"""Readers: the kinds of file that records come in, and where the datasets that have a name are found.

A reader yields (place, record), streaming in all kinds but JSON; where only one line is wrong, it yields a DataError in place of
the record. What a record's fields mean is preparing/records.py's part. A template of one's own is read here too, and what tokens
a model has beside its tokenizer.model.
"""

import csv
import gzip
import json
import re
from contextlib import suppress
from itertools import chain
from pathlib import Path


class DataError(ValueError):
    """A file of records, a tokenizer or a template that cannot be used."""


# Where the named datasets are, and which file of each to take.
_HUB = "https://huggingface.co/datasets/"
DATASETS = {
    "no_robots": ("HuggingFaceH4/no_robots", "data/train-*.parquet"),
    "openchat_sharegpt4": ("openchat/openchat_sharegpt4_dataset", "one of the .json files of conversations"),
    "openassistant-guanaco": ("timdettmers/openassistant-guanaco", "openassistant_best_replies_train.jsonl"),
    "h2ogpt-oig-oasst1-instruct-cleaned": ("h2oai/h2ogpt-oig-oasst1-instruct-cleaned-v2", "the .json file"),
    "open-platypus": ("garage-bAInd/Open-Platypus", "data/train-*.parquet"),
    "alpaca": ("tatsu-lab/alpaca", "data/train-*.parquet"),
    "dolphin": ("cognitivecomputations/dolphin", "flan1m-alpaca-uncensored.jsonl"),
    "openorca": ("Open-Orca/OpenOrca", "1M-GPT4-Augmented.parquet"),
    "open-instruct": ("VMware/open-instruct", "the .csv or .parquet file"),
    "function_calling_extended": ("Trelis/function_calling_extended", "the .csv or .json file"),
    "webglm-qa": ("THUDM/webglm-qa", "train.jsonl"),
}
_PASS = {"dolphin": " --system instruction --source input --target output"}  # its fields are Alpaca's, and mean something else


def reader_of(path: Path):
    """What reads a file of this ending; DataError if there is none, or no such file."""
    readers = {".jsonl": _jsonl_records, ".json": _json_records, ".csv": _csv_records, ".txt": _txt_records}
    readers[".parquet"] = _parquet_records
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the files in it")
    if path.name.lower() in DATASETS and not path.exists():
        home, file = DATASETS[path.name.lower()]
        pass_on = _PASS.get(path.name.lower(), "")
        raise DataError(f"{path.name} is not here: download {file} from {_HUB}{home} and pass its path: --data FILE{pass_on}")
    ending = (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()
    if ending not in readers or path.suffixes[-2:] == [".parquet", ".gz"]:
        found = path.suffix or "(no ending)"
        raise DataError(f"{path}: unknown kind of file {found!r}: known are {', '.join(readers)}, and .gz of the text ones")
    if not path.exists():
        raise DataError(f"{path} cannot be read: No such file or directory")
    return readers[ending]


def _lines(path: Path, raising: bool = True):
    """(number, text) of each line, Windows' endings made plain. Decoded singly, so that a bad byte is reported with its line:
    raised, or yielded in the line's place."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                text = DataError(f"not UTF-8 text ({error.reason} at byte {error.start})")
                if raising:
                    raise DataError(f"{path}, line {number}: {text}") from None
            yield number, text


def _jsonl_records(path: Path):
    for number, line in _lines(path, raising=False):
        try:
            if number == 1 and not isinstance(line, DataError) and line.lstrip().startswith("["):
                line = DataError("begins a list; if the file is one list of records, it should be called .json")
            if isinstance(line, DataError) or line.strip():
                yield f"line {number}", line if isinstance(line, DataError) else json.loads(line)
        except json.JSONDecodeError as error:
            yield f"line {number}", DataError(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list in a list in a list
            yield f"line {number}", DataError(f"not JSON that can be read: {error}")


def _json_records(path: Path):
    text = "".join(line for _, line in _lines(path))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; if it holds a record a line, it should be called .jsonl" if "Extra data" in str(error) else ""
        raise DataError(f"{path} is not JSON: {error}{hint}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of records, found {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        yield f"record {number}", record


def _csv_records(path: Path):
    csv.field_size_limit(2**31 - 1)  # its own limit is 128 KB a field
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    line_num = 0  # where the last good record ended: an open quote swallows the rest of the file
    try:
        named = reader.fieldnames
        if named is not None and not any(named):
            raise DataError(f"{path}, line 1: expected the names of the columns, found none")
        if named is not None and len(named) == 1 and re.search("[;\t]", named[0]):
            raise DataError(f"{path}, line 1: one column, named {named[0]!r}: are its columns parted by commas?")
        if twice := next((name for name in named or () if name and named.count(name) > 1), None):
            raise DataError(f"{path}, line 1: two columns are named {twice!r}, and only one of them would be read")
        for record in reader:
            where = f"line {reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{path}, {where}: expected {len(reader.fieldnames)} columns ({', '.join(reader.fieldnames)})")
            yield where, record
            line_num = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, the record from line {line_num + 1}: not CSV: {error}") from None


def _parquet_records(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with open(path, "rb") as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, (DataError, FileNotFoundError)):
            raise
        raise DataError(f"{path}, after row {number}: not parquet: {str(error).splitlines()[0]}") from None


def _txt_records(path: Path):
    paragraph, start = [], 1
    for number, line in chain(_lines(path), [(0, "")]):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"line {start}", {"text": "".join(paragraph).strip()}
            paragraph = []


def own_template(name: str) -> tuple[dict, str]:
    """The fields of a template from a JSON file, or from the JSON itself, and that JSON. It is proved by writing marks with it.

    {"user": "Q: {system}{user}\\nA:", "assistant": "{assistant}\\n", "stop": ["Q:"]}"""
    where = "--template" if name.startswith("{") else name
    try:
        given = json.loads(name if where != name else Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    places = {"user": ["user"], "assistant": ["assistant"], "system": ["system"], "user_with_input": ["user", "input"]}
    if not isinstance(given, dict) or not {"user", "assistant"} <= given.keys() <= {*places, "stop"}:
        raise DataError(f"{where}: a template holds user, assistant and perhaps system, user_with_input, stop: found {given!a}")
    kept = json.dumps(given, ensure_ascii=False)
    if half := re.search("[\ud800-\udfff]", kept):
        raise DataError(f"{where}: holds half a character, {half[0]!a}, which no tokenizer takes")
    if where == name and re.search("</?s>", kept):  # of a run that was trained with them they are a part
        raise DataError(f"{where}: leave out <s> and </s>: they are added where they belong, and here are only text")
    stop = given.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise DataError(f"{where}: 'stop' should be a list of strings that are not empty")
    for field in places.keys() & given.keys():
        marks = {place: f"\0{place}\0" for place in ["system", *places[field]]}
        try:  # written with marks in all places: does each needed one come out once, as it went in?
            written = str.format(given[field], **marks)
        except (TypeError, ValueError, LookupError, AttributeError):
            written = ""
        if any(written.count(marks[place]) != 1 for place in places[field]) or written.count(marks["system"]) > 1:
            expected = " and ".join(f"{{{place}}}" for place in places[field])
            raise DataError(f"{where}: {field!r} should hold {expected} once, other braces written twice, not {given[field]!r}")
    if "system" in given and "{system}" not in given["user"]:
        raise DataError(f"{where}: 'user' has no {{system}}, so a system message would be lost")
    return given | {"stop": tuple(stop)}, kept


def added_tokens(folder: Path) -> set[str]:
    """Tokens that the files of a Hugging Face folder name, in any of three places. A file that is none, or other, names none."""
    found = set()
    for file, named in (
        ("added_tokens.json", lambda fields: fields),
        ("tokenizer_config.json", lambda fields: [token["content"] for token in fields["added_tokens_decoder"].values()]),
        ("tokenizer.json", lambda fields: [token["content"] for token in fields["added_tokens"]]),
    ):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            fields = json.loads((folder / file).read_text("utf-8"))
            found |= {token for token in named(fields) if token and isinstance(token, str)}
    return found
