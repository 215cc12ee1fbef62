"""Preparing: from files as they are found to a file worth training on. What `python data.py prepare` runs.

    python data.py prepare raw.jsonl more.csv:2 --out train.jsonl --split 0.02 --against exam.jsonl

    clean     broken encoding, control characters, empty or cut turns, remains of markup, records that cannot be read
    length    more tokens than --model_max_length, or fewer than --min_tokens
    quality   refusals, repetition, mostly symbols, unreadable
    against   13 words in a row that stand in an evaluation file as well
    dedup     exact and near duplicates
    select    the longest, or the most diverse, --select K
    split     --split held out; nothing in training is a near-duplicate of it
    mix       in random order, a file of weight 2 twice

Every record is written or counted under the reason for which it is not.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from array import array
from itertools import chain, count
from pathlib import Path

import numpy as np

from data import Tokenizer, choose_template, encode_dialog, load_template
from helping.files import alone
from preparing.cache import content_key
from preparing.commands import STAGES, DataConfig
from preparing.pages import read_all, text_of
from preparing.readers import DataError
from preparing.records import Record, copies, dialog_of, parse_input, read_records

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # where words have no spaces between them, a character is a word


# What is wrong with a record, by stage and reason: of its messages m, all its text t, its replies r and their words w. In code
# markup is no remains. Two signs of UTF-8 read as Latin-1 or Windows-1252. Only refusals are looked for in English alone.
# Readability: Senter and Smith's index, 4.71 letters a word + 0.5 words a sentence - 21.43; English prose has 0 to 20.
FAULTS = {
    ("clean", "no reply"): lambda m, t, r, w: not r.strip(),
    ("clean", "empty turn"): lambda m, t, r, w: not all(message["content"].strip() for message in m),
    ("clean", "broken encoding"): lambda m, t, r, w: re.search("\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac", t),
    ("clean", "control characters"): lambda m, t, r, w: re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", t),
    ("clean", "markup remains"): lambda m, t, r, w: re.search(
        r"</?(div|span|p|br|b|i|a|td|tr)\b[^<>]*>|&(nbsp|amp|lt|gt|quot|#\d+);",
        re.sub(r"```.*?(```|$)|`[^`]*`", "", r, flags=re.S),
    ),
    ("clean", "truncated"): lambda m, t, r, w: r.count("```") % 2 or re.fullmatch(r"[^\n]{120}[a-z,;]", r.rstrip()[-121:]),
    ("quality", "refusal"): lambda m, t, r, w: re.search(r"(?i)\bas an ai\b|\bi (cannot|can['’]t) (fulfil|assist)", r),
    ("quality", "repetition"): lambda m, t, r, w: len(w) >= 30 and len({*zip(w, w[1:], w[2:], strict=False)}) < len(w) / 2,
    ("quality", "symbols"): lambda m, t, r, w: len(w) >= 30 and len(re.findall(r"[^\w\s]", r)) > 0.3 * len(r),
    ("quality", "readability"): lambda m, t, r, w: (
        len(w) >= 30
        and not -20 < 4.71 * len("".join(w)) / len(w) + 0.5 * len(w) / len(re.findall(r"[.!?。！？\n]+|\Z", r)) - 21.43 < 50
    ),
}


def fault(dialog: list[dict], stage: str) -> str | None:
    """The first thing that is wrong with a dialog, of what this stage looks for."""
    replies = text_of(dialog, "assistant")
    parts = dialog, text_of(dialog), replies, WORD.findall(replies.lower())
    return next((reason for (of, reason), wrong in FAULTS.items() if of == stage and wrong(*parts)), None)


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower()) or [" ".join(text.split())]  # signs alone are one word: + is no duplicate of =


class NearDuplicates:
    """Finds texts that share `threshold` of their words: Jaccard's words in both / words in either, where a word's second
    occurrence is another word than its first. At 0.95 one word in 40 may differ; the order of words does not count.

    Comparing all pairs is quadratic. MinHash (Broder, "On the resemblance and containment of documents") makes it linear: of
    a random function over the words, two texts have the same minimum with a probability equal to their similarity. 128 such
    minima are cut into bands; of texts equal in all of one band all minima are compared, and where so many agree that they may
    be near-duplicates, the words themselves. Others never meet."""

    MINIMA = 128

    def __init__(self, threshold: float):
        self.threshold, self.sets, self.seen, self.buckets, self.links = threshold, [], [], {}, []
        # How many minima a near-duplicate shares at least: the mean less four standard deviations.
        self.least = self.MINIMA * threshold - 4 * (self.MINIMA * threshold * (1 - threshold)) ** 0.5
        # The longest bands that miss fewer than one pair in a hundred at the threshold itself: the fewest false alarms.
        missed = {rows: (1 - threshold**rows) ** (self.MINIMA // rows) for rows in range(1, 33)}
        self.rows = max(rows for rows in missed if missed[rows] < 1e-2 or rows == 1)
        self.factors = np.random.default_rng(0).integers(2**63, size=(self.MINIMA, 1), dtype=np.uint64) * 2 + 1
        self.hash = functools.lru_cache(2**18)(
            lambda word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        )

    def words(self, text: str) -> np.ndarray:
        """(n,) uint64, a number for each word and its first, second, ... occurrence."""
        words = np.array([self.hash(word) for word in words_of(text)], np.uint64)
        words.sort()
        first = np.flatnonzero(np.concatenate([[True], words[1:] != words[:-1]]))
        occurrence = np.arange(len(words)) - np.repeat(first, np.diff(first, append=len(words)))
        return words + occurrence.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)

    def minima(self, words: np.ndarray) -> np.ndarray:
        return ((words * self.factors) >> np.uint64(32)).min(1).astype(np.uint32)

    def find(self, text: str, add: bool = True) -> int | None:
        """The number of an earlier text that is a near-duplicate of this one; if there is none, this text is added."""
        words = self.words(text)
        minima = self.minima(words)
        bands = [hash((i, minima[i : i + self.rows].tobytes())) for i in range(0, self.MINIMA - self.rows + 1, self.rows)]
        own, met = np.sort((words >> np.uint64(32)).astype(np.uint32)), set()
        for i, band in enumerate(bands):
            other, steps = self.buckets.get(band, -1), 0
            while other >= 0 and steps < 100:  # texts that all share a band but are no duplicates must not make it quadratic
                if other not in met and np.count_nonzero(minima == self.seen[other]) >= self.least:
                    theirs = self.sets[other]
                    both = len(own) - len(np.setdiff1d(own, theirs, assume_unique=True))
                    if both >= self.threshold * (len(own) + len(theirs) - both):
                        return other
                met.add(other)
                other, steps = self.links[other][i], steps + 1
        if add:
            self.links.append(array("i", [self.buckets.get(band, -1) for band in bands]))
            self.buckets.update(dict.fromkeys(bands, len(self.sets)))
            self.sets.append(own)
            self.seen.append(minima)
        return None


def ngrams(dialog: list[dict], n: int = 13) -> set[tuple[str, ...]]:
    """Runs of 13 words, as GPT-3 was checked against its benchmarks (Brown et al., appendix C); a shorter text is one run."""
    words = words_of(text_of(dialog))
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


class Preparation:
    """The stages of one `prepare`. Each is a generator: of the lines that the stage before has kept, those that it keeps.

    A stage's output is a file in the folder `work` that has its name only when it is whole; `done` is what was counted up to
    there, kept beside it. A line is the weight of the file it came from, a tab, and the record as JSON."""

    def __init__(self, config: DataConfig, inputs, evaluations, template, tokenizer: Tokenizer, work: Path):
        self.config, self.inputs, self.evaluations, self.work = config, inputs, evaluations, work
        self.template, self.tokenizer = template, tokenizer
        self.done = {"stage": None, "read": 0, "left": 0, "lines": 0, "held": 0, "removed": {}}

    def run(self, name: str) -> None:
        """One stage. Its removals are in `done` under "stage reason": [how many, the first two]."""
        before, left, lines, self.now = self.done["stage"], 0, 0, "clean" if name == "read" else name
        with open(self.work / "unfinished", "wb") as file:
            for line in getattr(self, name)():
                file.write(line)
                left, lines = left + 1, lines + line.count(b"\n")
        self.done |= {"stage": name, "left": left, "lines": lines}
        if name == "read":
            self.done["read"] = left + self.removed()
        (self.work / f"{name}.json").write_text(json.dumps(self.done))
        os.replace(self.work / "unfinished", self.work / f"{name}.jsonl")
        if before:
            (self.work / f"{before}.jsonl").unlink()

    def removed(self) -> int:
        return sum(number for number, _ in self.done["removed"].values())

    def remove(self, reason: str, example: str) -> None:
        key = f"{self.now} {reason}"
        number, examples = self.done["removed"].get(key, (0, []))
        self.done["removed"][key] = number + 1, [*examples, example][:2]

    def lines(self, name: str | None = None):
        with open(self.work / f"{name or self.done['stage']}.jsonl", "rb") as file:
            yield from file

    def records(self, skip=()):
        for i, line in enumerate(self.lines()):
            if i not in skip:
                found = json.loads(line.partition(b"\t")[2])
                kind, dialog = dialog_of(found, None, None, None)
                yield line, Record(dialog, kind, found["provenance"])

    def compared(self, record: Record) -> str:
        return text_of(record.dialog, "assistant" if self.config.dedup_on == "reply" else None)

    def without(self, reason_of, skip=()):
        """The lines of which reason_of(record) has nothing to say; else it says a reason, or "reason|more"."""
        for line, record in self.records(skip):
            if found := reason_of(record):
                reason, _, more = found.partition("|")
                self.remove(reason, f"{record.origin} {more}: ...{text_of(record.dialog)[-60:]!r}")
            else:
                yield line

    def read(self):
        def refuse(message):
            self.remove("malformed", message)

        for path, weight in self.inputs:
            for record in read_all(self.config, [path], refuse if "clean" in self.config.stages else None):
                raw = record.dialog[0]["role"] == "text"
                said = {"text": text_of(record.dialog)} if raw else {"messages": record.dialog, "kind": record.kind}
                yield f"{weight}\t{json.dumps(said | {'provenance': record.origin}, ensure_ascii=False)}\n".encode()

    def clean(self):
        return self.without(lambda record: fault(record.dialog, "clean"))

    def length(self):
        def wrong(record):
            template = self.template or choose_template([record.kind], None)[0]
            tokens = len(encode_dialog(record.dialog, self.tokenizer, template)[0])
            if tokens > self.config.model_max_length:
                return f"longer than the {self.config.model_max_length} tokens of --model_max_length"
            return (
                f"shorter than the {self.config.min_tokens} tokens of --min_tokens" if tokens < self.config.min_tokens else None
            )

        return self.without(wrong)

    def quality(self):
        return self.without(lambda record: fault(record.dialog, "quality"))

    def against(self):
        evaluated = {gram: r.origin for path in self.evaluations for r in read_records(path) for gram in ngrams(r.dialog)}

        def contaminated(record):
            shared = ngrams(record.dialog) & evaluated.keys()
            return f"shares 13 words|with {evaluated[min(shared)]}" if shared else None

        return self.without(contaminated)

    def dedup(self):  # after the stages that look at one record: what goes for another reason takes no duplicates with it
        near, exact, origins = NearDuplicates(self.config.near), {}, []

        def duplicate(record):
            text = self.compared(record)
            key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            if key in exact:
                return f"exact duplicate|of {origins[exact[key]]}"
            if (other := near.find(text)) is not None:
                return f"near-duplicate|of {origins[other]}"
            exact[key] = len(origins)
            origins.append(record.origin)

        return self.without(duplicate)

    def select(self):
        k, by, near = min(self.config.select, self.done["left"]), self.config.select_by, NearDuplicates(self.config.near)
        replies = (text_of(record.dialog, "assistant") for _, record in self.records())
        if by == "longest":
            sizes = list(map(len, replies))
            kept = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:k]
        else:
            kept = most_diverse(np.array([near.minima(near.words(reply)) for reply in replies]), k)
        numbers, kept = count(), {*kept}
        return self.without(lambda _: None if next(numbers) in kept else f"not among the {k:,} {by}")

    def split(self):
        across = NearDuplicates(self.config.near)
        order = np.random.default_rng(self.config.seed).permutation(self.done["left"])
        held = {*order[: max(1, round(self.config.split * len(order)))].tolist()}
        if len(held) == len(order) > 0:
            raise DataError(f"--split {self.config.split} of {len(order)} records leaves none to train on")
        with open(self.work / "held.jsonl", "wb") as file:
            for i, (line, record) in enumerate(self.records()):
                if i in held:
                    across.find(self.compared(record))
                    file.write(line)
        self.done["held"] = len(held)
        torn = "near-duplicate of a validation record"
        return self.without(lambda r: None if across.find(self.compared(r), add=False) is None else torn, held)

    def mix(self):
        """In random order; a file of weight 2 twice."""
        places = np.cumsum(np.fromiter(chain([0], map(len, self.lines())), np.int64))
        with open(self.work / f"{self.done['stage']}.jsonl", "rb") as file:
            for i in np.random.default_rng(self.config.seed).permutation(len(places) - 1).tolist():
                file.seek(places[i])
                line = file.readline()
                if times := copies(float(line.partition(b"\t")[0]), i, self.config.seed):
                    yield line * times
                else:
                    self.remove("left out by the weight of its file", json.loads(line.partition(b"\t")[2])["provenance"])


def prepare(config: DataConfig, inputs, tokenizer: Tokenizer) -> None:
    """Read the inputs, take them through the stages that are on, and write what is left, held out or not.

    What a stage has finished stays in OUT.work until the end, under a name made of the inputs, the flags and this program: where
    these are the same, a run that was killed goes on after its last whole stage and writes the same bytes. A prepared file can
    be prepared again, so stages can also be run one by one; a record always knows where it first came from."""
    out = Path(config.out or "")
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise DataError("prepare needs --out FILE.jsonl, the file to write, in a folder that exists")
    validation, home = out.with_name(f"{out.stem}.validation.jsonl"), Path(f"{out}.work")
    there = [path for path in (out, validation) if path.exists()]
    if there and not config.overwrite and not (there == [validation] and home.exists()):  # killed between writing the two
        raise DataError(f"{there[0]} exists already: name another with --out, or replace it with --overwrite")
    template = config.template and load_template(config.template)[0]
    evaluations = [parse_input(path)[0] for path in config.against]
    decides = dataclasses.replace(config, out=None, overwrite=False, n=1, plot=None, tokenizer=""), template, inputs
    work = home / content_key(decides, [*(path for path, _ in inputs), *evaluations], tokenizer)
    needed = {"against": config.against, "select": config.select, "split": config.split}
    stages = ["read", *(name for name in STAGES if name in config.stages and needed.get(name, True))]
    run = Preparation(config, inputs, evaluations, template, tokenizer, work)
    with alone(home, DataError(f"another prepare is at work on {out}, in {home}: name another file with --out")):
        try:
            finish(run, stages, out, validation)
        except DataError:
            shutil.rmtree(home)  # the inputs must change before it can go on
            raise
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{home}: {reason}; the stages that are finished stay there, and the same command goes on") from None
        shutil.rmtree(home)
    done = run.done
    print(f"{done['read']:,} records read from {', '.join(str(path) for path, _ in inputs)}")
    for key, (number, examples) in sorted(done["removed"].items(), key=lambda item: STAGES.index(item[0].split()[0])):
        stage, _, reason = key.partition(" ")
        print(f"  {stage:8} -{number:<7,} {reason}", *examples, sep="\n" + " " * 20)
    held = f", {done['held']:,} in {validation}" if done["held"] else ""
    print(f"{done['left']:,} left, {done['lines']:,} lines in {out}{held}")


def finish(run: Preparation, stages: list[str], out: Path, validation: Path) -> None:
    """Go through the stages that are not finished yet, and write the files."""
    work = run.work
    if not work.is_dir():
        for other in work.parent.iterdir():  # of other inputs or flags
            shutil.rmtree(other)
        work.mkdir()
    todo = stages
    for i, name in enumerate(stages):
        if (work / f"{name}.jsonl").exists():
            run.done, todo = json.loads((work / f"{name}.json").read_text()), stages[i + 1 :]
    if todo != stages:
        print(f"going on after the stage {run.done['stage']} of a run that was stopped")
    for name in todo:
        run.run(name)
    done = run.done
    assert done["read"] == done["left"] + done["held"] + run.removed(), "a record is neither written nor counted as removed"
    validation.unlink(missing_ok=True)  # of a run that is replaced
    for name, path in (("held", validation), (stages[-1], out))[not done["held"] :]:
        with open(f"{path}.tmp", "wb") as target:
            target.writelines(line.partition(b"\t")[2] for line in run.lines(name))
        os.replace(f"{path}.tmp", path)
    work.rename(work.with_name("over"))  # killed while it tidies up, there is nothing half removed to go on from


def most_diverse(minima: np.ndarray, k: int) -> list[int]:
    """k rows of (n, 128) MinHash minima: first 0, then always the one least like all that were chosen before."""
    chosen, likest = [], np.zeros(len(minima))
    for _ in range(k):
        chosen.append(int(likest.argmin()))
        likest = np.maximum(likest, (minima == minima[chosen[-1]]).mean(1))
        likest[chosen[-1]] = 2
    return chosen
