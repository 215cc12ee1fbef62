"""What `python data.py show` and `stats` print: the tokens as the model will see them, and what a file holds in sum."""

import hashlib
import sys
from array import array
from collections import Counter
from itertools import chain, islice

import numpy as np

from data import IGNORE, Template, Tokenizer, choose_template, encode_dialog, has_reply, pack
from helping.files import writing
from preparing.commands import DataConfig
from preparing.readers import DataError
from preparing.records import read_records


def read_all(config: DataConfig, paths, refuse=None):
    """The records of several files, one after another, as the flags say."""
    return chain.from_iterable(read_records(path, config.source, config.target, config.system, refuse) for path in paths)


def text_of(dialog: list[dict], role: str | None = None) -> str:
    """What a dialog says, or one role in it, a message a line; raw text is everybody's."""
    return "\n".join(m["content"] + m.get("input", "") for m in dialog if role in (None, m["role"]) or m["role"] == "text")


def template_for(config: DataConfig, paths) -> Template:
    """The template that train.py would take for all these files, and a word on it."""
    kinds = {record.kind for record in read_all(config, paths)} if config.template is None else ()
    template, name, why = choose_template(kinds, config.template)
    print(f"template {name}: {why}")
    return template


def show(config: DataConfig, inputs, tokenizer: Tokenizer) -> None:
    """The first n records as the model will see them: piece and id, what is supervised in green (or with a * before it)."""
    paths, colour = [path for path, _ in inputs], sys.stdout.isatty()
    template = template_for(config, paths)
    for record in islice(read_all(config, paths), config.n):
        ids, labels = encode_dialog(record.dialog, tokenizer, template)
        supervised = [label != IGNORE for label in labels]
        print(f"--- {record.origin}: {len(ids)} tokens, {sum(supervised)} supervised ({'green' if colour else '*'})", end="")
        width = 119
        for i, (piece, token, green) in enumerate(zip(tokenizer.pieces.id_to_piece(ids), ids, supervised, strict=True)):
            text = f"{'*' if green and not colour else ''}{piece}:{token} "
            if i == config.model_max_length:
                print(f"\n--- cut here, at {i} tokens (--model_max_length)", end="")
            if i == config.model_max_length or width + len(text) > 118:
                print()
                width = 0
            print(f"\033[32m{text}\033[0m" if green and colour else text, end="")
            width += len(text)
        print("\n--- end of document")


def stats(config: DataConfig, inputs, tokenizer: Tokenizer) -> None:
    """Records, turns, tokens per part, lengths, share supervised, exact duplicates, what is cut, packing against padding."""
    sizes, seen, parts, counts, limit = array("i"), set(), Counter(), Counter(), config.model_max_length
    paths = [path for path, _ in inputs]
    template = template_for(config, paths)
    for record in read_all(config, paths):
        ids, labels = encode_dialog(record.dialog, tokenizer, template)
        sizes.append(len(ids))
        counts["supervised"] += sum(label != IGNORE for label in labels)
        counts["mute"] += not has_reply(record.dialog) or all(label == IGNORE for label in labels[1:limit])
        counts["turns"] += sum(m["role"] != "system" for m in record.dialog)
        seen.add(hashlib.blake2b(repr(record.dialog).encode(), digest_size=16).digest())
        for message in record.dialog:
            parts[message["role"]] += len(tokenizer.encode(text_of([message]).strip()))  # as a template writes it
    n, total = len(sizes), sum(sizes)
    parts["template"] = total - sum(parts.values())
    print(f"{n:,} records, {n - len(seen):,} of them exact duplicates; {counts['turns']:,} turns")
    print(f"{total:,} tokens, {counts['supervised'] / total:.1%} supervised:", end=" ")
    print(*(f"{part} {count:,} ({count / total:.1%})" for part, count in parts.items()), sep=", ")
    edges = [0, *(2**i for i in range(4, max(4, max(sizes).bit_length()) + 1))]
    heights = np.histogram(sizes, edges)[0]
    print(f"tokens of a record: median {np.median(sizes):,.0f}, 99 % have at most {np.percentile(sizes, 99):,.0f}")
    for i, height in enumerate(heights):
        print(f"  {edges[i]:7,} to {edges[i + 1] - 1:7,} {height:9,} {'#' * round(60 * height / max(heights))}")
    lengths = np.minimum(sizes, limit)
    longer, lost = sum(lengths < sizes), total - sum(lengths)
    print(f"{longer:,} records are longer than {limit:,} (--model_max_length), {lost:,} tokens lost")
    print(f"{counts['mute']:,} have no reply, or one that begins after {limit:,} tokens: train.py leaves them out")
    order = np.random.default_rng(config.seed).permutation(n)
    full = sum(lengths) / (len(pack(lengths, limit, order)) * limit)
    batches = [lengths[order[i : i + 8]] for i in range(0, n, 8)]
    padded = sum(lengths) / sum(batch.max() * len(batch) for batch in batches)
    print(f"packed in rows of {limit:,}: {full:.1%} real tokens; batches of 8 padded to their longest: {padded:.1%}")
    if config.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise DataError("--plot needs matplotlib: pip install matplotlib") from None
        figure = Figure()
        figure.subplots(subplot_kw={"xlabel": "tokens of a record", "ylabel": "records"}).hist(sizes, bins=60)
        with writing(config.plot):
            figure.savefig(config.plot)
