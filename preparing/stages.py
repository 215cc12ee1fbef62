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

import functools
import hashlib
import json
import os
import re
import tempfile
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from data import (
    STAGES,
    DataConfig,
    DataError,
    Tokenizer,
    choose_template,
    copies,
    dialog_of,
    encode_dialog,
    read_all,
    read_records,
    text_of,
)

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
    """The first thing that is wrong with a dialog."""
    replies = text_of(dialog, "assistant")
    parts = dialog, text_of(dialog), replies, WORD.findall(replies.lower())
    return next((reason for (of, reason), wrong in FAULTS.items() if of == stage and wrong(*parts)), None)


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
        words = np.array([self.hash(word) for word in WORD.findall(text.lower())] or [0], np.uint64)
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
    words = WORD.findall(text_of(dialog).lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def prepare(config: DataConfig, inputs, tokenizer: Tokenizer) -> None:
    """Read once, record by record, through the stages that look at a record by itself or at those before it; keep what passes in
    an unnamed file; then select, split and mix by number; write. A prepared file can be prepared again, so stages can be run
    one by one, each going on from the file of the one before; a record always knows where it first came from."""
    out = Path(config.out or "")
    if out.suffix != ".jsonl" or not out.parent.is_dir():
        raise DataError("prepare needs --out FILE.jsonl, the file to write, in a folder that exists")
    validation = out.with_name(f"{out.stem}.validation.jsonl")
    if existing := [str(path) for path in (out, validation) if path.exists() and not config.overwrite]:
        raise DataError(f"{existing[0]} exists already: name another with --out, or replace it with --overwrite")
    removed, examples, near, exact, origins = Counter(), {}, NearDuplicates(config.near), {}, []
    evaluated = {
        gram: record.origin for path in config.against for record in read_records(path) for gram in ngrams(record.dialog)
    }

    def remove(stage, reason, example):
        removed[stage, reason] += 1
        examples[stage, reason] = (*examples.get((stage, reason), ()), example)[:2]

    def compared(dialog):
        return text_of(dialog, "assistant" if config.dedup_on == "reply" else None)

    def length(record):
        tokens = len(encode_dialog(record.dialog, tokenizer, choose_template([record.kind], config.template)[0])[0])
        return "too long" if tokens > config.model_max_length else "too short" if tokens < config.min_tokens else None

    def contaminated(record):
        shared = ngrams(record.dialog) & evaluated.keys()
        return f"shares 13 words|with {evaluated[min(shared)]}" if shared else None

    def duplicate(record):
        text = compared(record.dialog)
        key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if key in exact:
            return f"exact duplicate|of {origins[exact[key]]}"
        if (other := near.find(text)) is not None:
            return f"near-duplicate|of {origins[other]}"
        exact[key] = len(origins)
        origins.append(record.origin)

    # dedup last: a record that goes for another reason must not take its duplicates with it.
    checks = {
        stage: functools.partial(lambda stage, record: fault(record.dialog, stage), stage) for stage in ("clean", "quality")
    }
    checks |= {"length": length, "against": contaminated, "dedup": duplicate}
    read, places, weights, scores = Counter(), array("q"), array("d"), []

    def refuse(message):
        read["refused"] += 1
        remove("clean", "malformed", message)

    with tempfile.TemporaryFile(dir=out.parent) as file:
        for path, weight in inputs:
            for record in read_all(config, [path], refuse if "clean" in config.stages else None):
                read["good"] += 1
                for stage in (stage for stage in STAGES if stage in checks and stage in config.stages):
                    if found := checks[stage](record):
                        reason, _, more = found.partition("|")
                        remove(stage, reason, f"{record.origin} {more}: ...{text_of(record.dialog)[-60:]!r}")
                        break
                else:
                    places.append(file.tell())
                    weights.append(weight)
                    reply = text_of(record.dialog, "assistant")
                    scores.append(
                        len(reply) if config.select_by == "longest" or not config.select else near.minima(near.words(reply))
                    )
                    raw = record.dialog[0]["role"] == "text"
                    said = {"text": reply} if raw else {"messages": record.dialog, "kind": record.kind}
                    file.write(json.dumps(said | {"provenance": record.origin}, ensure_ascii=False).encode() + b"\n")

        def line(i):
            file.seek(places[i])
            return file.readline()

        def dialog(i):
            return dialog_of(json.loads(line(i)), None, None, None)[1]

        kept, held = list(range(len(places))), []
        if "select" in config.stages and 0 < config.select < len(kept):
            by_length = sorted(kept, key=lambda i: -scores[i])[: config.select] if config.select_by == "longest" else None
            kept = sorted(by_length or most_diverse(np.array(scores), config.select))
            for i in sorted({*range(len(places))} - {*kept}):
                remove("select", f"not among the {config.select:,} {config.select_by}", json.loads(line(i))["provenance"])
        if "split" in config.stages and config.split and kept:
            held = sorted(
                np.random.default_rng(config.seed).permutation(kept)[: max(1, round(config.split * len(kept)))].tolist()
            )
            across, rest = NearDuplicates(config.near), sorted({*kept} - {*held})
            for i in held:
                across.find(compared(dialog(i)))
            kept = [i for i in rest if across.find(compared(dialog(i)), add=False) is None]
            for i in sorted({*rest} - {*kept}):
                remove("split", "near-duplicate of a validation record", json.loads(line(i))["provenance"])
        written = kept
        if "mix" in config.stages:  # in random order, as often as the weight of the file says
            shuffled = np.random.default_rng(config.seed).permutation(kept).tolist()
            written = [i for i in shuffled for _ in range(copies(weights[i], i, config.seed))]
            for i in sorted({*kept} - {*written}):
                remove("mix", "left out by the weight of its file", json.loads(line(i))["provenance"])
            kept = sorted({*written})
        assert read.total() == len(kept) + len(held) + removed.total(), "a record is neither written nor counted as removed"
        for path, numbers in ((out, written), (validation, held)):
            with open(f"{path}.tmp", "wb") as target:
                target.writelines(map(line, numbers))
        os.replace(f"{validation}.tmp", validation)
        os.replace(f"{out}.tmp", out)
        if not held:
            validation.unlink()
    print(f"{read.total():,} records read from {', '.join(str(path) for path, _ in inputs)}")
    for (stage, reason), count in sorted(removed.items(), key=lambda item: STAGES.index(item[0][0])):
        print(f"  {stage:8} -{count:<7,} {reason}", *examples[stage, reason], sep="\n" + " " * 20)
    print(f"{len(kept):,} left, {len(written):,} lines in {out}" + (f", {len(held):,} in {validation}" if held else ""))


def most_diverse(minima: np.ndarray, k: int) -> list[int]:
    """k rows of (n, 128) MinHash minima: first 0, then always the one least like all that were chosen before."""
    chosen, likest = [], np.zeros(len(minima))
    for _ in range(k):
        chosen.append(int(likest.argmin()))
        likest = np.maximum(likest, (minima == minima[chosen[-1]]).mean(1))
        likest[chosen[-1]] = 2
    return chosen
