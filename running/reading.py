"""What a run reads: every record, checked and tokenised before the model is loaded.

data.py turns a record into tokens. Here stands what that means for a run with several files, weights, held-out shares and
processes: each record is read once for its faults and once for its tokens, and if there are many (preparing/cache.py) once for
all runs."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from data import DataError, PackedBatches, Template, Tokenizer, choose_template, encode_documents, load_template
from preparing.cache import cache_folder, once
from preparing.readers import reader_of
from preparing.records import copies, parse_input, read_records


@dataclass
class Data:
    """What a run reads: the tokenizer and template, the rows to train on, and what is held out."""

    tokenizer: Tokenizer
    template: Template
    template_name: str
    batches: PackedBatches
    held_out: dict[str, list]  # dialogs by the name of their file
    evaluations: dict[str, PackedBatches]  # the same, as rows


def read_data(config, say) -> Data:
    """Read, check and tokenise every record that a train.TrainConfig names. Raises DataError with the place of a bad one."""
    tokenizer = Tokenizer(tokenizer_file(config))
    if config.template is not None:
        load_template(config.template)  # an unknown name is refused before anything is read, and so are those of files:
    inputs = [parse_input(given) for given in config.data]
    for path in config.eval_data:
        reader_of(Path(path))

    def read(path):
        return read_records(path, config.source, config.target, config.system)

    def numbered():
        """(number, record, how often it is seen) of all the data, read anew each time so that it need not fit in memory."""
        records = ((record, weight) for path, weight in inputs for record in read(path))
        return ((number, record, copies(weight, number, config.seed)) for number, (record, weight) in enumerate(records))

    # Once through everything, keeping nothing: a bad record is found before anything is tokenised. What is large and was found
    # good is not read again, and of the processes on a machine only the first reads it and only the first tokenises it.
    def count_kinds():
        return Counter(record.kind for _, record, _ in numbered())

    files, weights = zip(*inputs, strict=True)
    if known := cache_folder(files, tokenizer, "kinds", config.source, config.target, config.system):
        once(known, lambda folder: (folder / "kinds.json").write_text(json.dumps(count_kinds())))
        kinds = json.loads((known / "kinds.json").read_text())
    else:
        kinds = count_kinds()
    total = sum(kinds.values())
    held_out = {Path(path).stem: [record.dialog for record in read(path)] for path in config.eval_data}
    chosen = {}  # held-out dialogs by number, in the order drawn
    if config.eval_split:
        order = np.random.default_rng(config.seed).permutation(total)
        chosen = dict.fromkeys(order[: max(1, round(config.eval_split * total))].tolist())
        if len(chosen) == total:
            raise DataError(f"--eval_split {config.eval_split} of {total} records leaves none to train on")
        chosen.update((number, record.dialog) for number, record, _ in numbered() if number in chosen)
        held_out = {"held_out": list(chosen.values())}
    template, name, why = choose_template(kinds, config.template)
    if config.template is None:
        say(f"template {name}: {why}")

    def pack(name, dialogs, shuffle, cache=None):
        how = {"max_length": config.model_max_length, "too_long": config.too_long, "train_on_inputs": config.train_on_inputs}
        documents, fates = encode_documents(dialogs, tokenizer, template, **how, cache=cache)
        if not documents:
            why = ", ".join(f"{count:,} {fate}" for fate, count in fates.items()) or "their weights leave no record"
            raise DataError(f"{name}: nothing to learn from: {why}")
        batches = PackedBatches(documents, config.per_device_train_batch_size * config.model_max_length, config.seed, shuffle)
        tokens, supervised = sum(batches.sizes), sum(batches.supervised)
        full = tokens / (len(batches) * batches.row_tokens)
        in_order = sorted(fates.items(), key=lambda item: item[0] != "kept")
        say(f"{name}: " + ", ".join(f"{count:,} {fate}" for fate, count in in_order))
        say(
            f"  {tokens:,} tokens, {supervised:,} supervised, in {len(batches):,} rows of {batches.row_tokens:,}, {full:.0%} full"
        )
        return batches

    decides = "source target system model_max_length too_long train_on_inputs eval_split seed".split()
    seen = chain.from_iterable(repeat(record.dialog, times) for number, record, times in numbered() if number not in chosen)
    cache = cache_folder(files, tokenizer, template, weights, *(getattr(config, name) for name in decides))
    batches = pack(", ".join(Path(path).name for path in config.data), seen, True, cache)
    evaluations = {name: pack(name, records, shuffle=False) for name, records in held_out.items()}
    return Data(tokenizer, template, name, batches, held_out, evaluations)


def tokenizer_file(config) -> Path:
    return Path(config.tokenizer or Path(config.model) / "tokenizer.model")
