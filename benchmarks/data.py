"""Data: tokenising and packing beside transformers' fast tokenizer and a plain loop; near-duplicates: speed, memory, and how many
are found and how many wrongly.

    python benchmarks/data.py --data no_robots_test.jsonl --tokenizer llama2_tokenizer.model [--near 10000 100000 1000000]
    python benchmarks/data.py --data no_robots_test.jsonl --tokenizer llama2_tokenizer.model --large 5 --dialogs --near

Tokenising: the file's dialogs in the llama2 template, repeated to so many. Theirs is calls of the fast tokenizer on the turns of
5,000 dialogs, written out as Meta does, and a loop that appends each to the last row or opens another; in turns, the best counts.
Large: what train.py reads before it trains, time and memory. Near-duplicates: texts of 200 words drawn as words of a language are
(Zipf); for the quality each is planted once more with 1, 3 or 10 % of its words replaced. Each size is a process of its own: its
memory is its own."""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import TEMPLATES, PackedBatches, Tokenizer, encode_documents, read_dialogs, write_dialog  # noqa: E402
from preparing.stages import NearDuplicates  # noqa: E402


def texts(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield [f"w{word}" for word in np.minimum(rng.zipf(1.3, 200), 100_000)]


def near_speed(n: int) -> None:
    near, started, found = NearDuplicates(0.95), time.perf_counter(), 0
    for words in texts(n):
        found += near.find(" ".join(words)) is not None
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {n:,} | {seconds:.0f} s | {n / seconds:,.0f} | {peak:.2f} GiB |", flush=True)


def near_quality(n: int = 2000) -> None:
    print(
        "| threshold | words replaced | are at the threshold | found of these | found in all | wrong |\n|---|---|---|---|---|---|"
    )
    for threshold in (0.95, 0.8):
        for edited in (0.01, 0.03, 0.10):
            rng, near, hits, wrong, alike = np.random.default_rng(1), NearDuplicates(threshold), [], 0, []
            originals = list(texts(n))
            for words in originals:
                near.find(" ".join(words))
            for i, words in enumerate(originals):
                for place in rng.choice(200, round(200 * edited), replace=False):
                    words[place] = f"new{rng.integers(10**9)}"
                other = near.find(" ".join(words), add=False)
                hits.append(other == i)
                wrong += other is not None and other != i
                alike.append((200 - round(200 * edited)) / (200 + round(200 * edited)) >= threshold)  # by construction
            wrong += sum(near.find(" ".join(words), add=False) is not None for words in texts(n, seed=2))  # never planted
            recall = f"{np.mean(np.array(hits)[alike]):.3f}" if any(alike) else "none to find"
            precision = f"{sum(hits) / (sum(hits) + wrong):.3f}" if sum(hits) + wrong else "none found"
            shown = f"| {threshold} | {edited:.0%} | {np.mean(alike):.0%} | {recall} | {np.mean(hits):.3f} |"
            print(f"{shown} {wrong} (precision {precision}) |", flush=True)


def fast_tokenizer(path: str):
    from transformers import LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(Path(path).read_bytes())
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        return LlamaTokenizerFast.from_pretrained(folder)


def tokenising(path: str, tokenizer_path: str, n: int, length: int = 2048) -> None:
    """A line of the table: n dialogs, ours and theirs in turns, the best of three (from 100,000 on, once)."""
    dialogs = list(read_dialogs(path))
    dialogs = (dialogs * (1 + n // len(dialogs)))[:n]
    tokenizer, template, fast = Tokenizer(tokenizer_path), TEMPLATES["llama2"], fast_tokenizer(tokenizer_path)

    def ours():
        documents, _ = encode_documents(dialogs, tokenizer, template, max_length=length)
        return PackedBatches(documents, length)

    def theirs():
        rows = [[]]
        for start in range(0, n, 5000):  # one call for all of 100,000 dialogs takes longer and 3 GB
            pieces = [write_dialog(dialog, template) for dialog in dialogs[start : start + 5000]]
            encoded = iter(fast([piece.text for written in pieces for piece in written], add_special_tokens=False)["input_ids"])
            for written in pieces:
                document = []
                for piece in written:
                    document += [1] * piece.begins + next(encoded) + [2] * piece.reply
                if len(rows[-1]) + len(document) > length:
                    rows.append([])
                rows[-1] += document[:length]
        return rows

    best = {}
    for _ in range(1 if n >= 100_000 else 3):
        for work in (ours, theirs):
            started, cpu = time.perf_counter(), time.process_time()
            rows = work()
            took = time.perf_counter() - started, time.process_time() - cpu
            if work is ours:
                tokens = int(sum(rows.sizes))
            full = tokens / len(rows) / length
            best[work] = (*map(min, took, best.get(work, (np.inf, np.inf))), full)
            del rows
    (mine, my_cpu, my_full), (others, their_cpu, their_full) = best[ours], best[theirs]
    print(
        f"| {n:,} | {tokens:,} | {mine:.2f} s, {tokens / mine:,.0f} | {others:.2f} s, {tokens / others:,.0f} | "
        f"{others / mine:.2f} | {my_cpu:.2f} s, {their_cpu:.2f} s, {their_cpu / my_cpu:.2f} | {my_full:.1%} | {their_full:.1%} |",
        flush=True,
    )


def packing(path: str, tokenizer_path: str, length: int = 2048) -> None:
    documents, _ = encode_documents(read_dialogs(path), Tokenizer(tokenizer_path), TEMPLATES["llama2"], max_length=length)
    sizes = np.array([len(ids) for ids, _ in documents])
    supervised = sum(int((labels[1:] != -100).sum()) for _, labels in documents) / sizes.sum()
    packed = sizes.sum() / (len(PackedBatches(documents, length)) * length)
    print(f"\nthe file once, rows of {length:,}: {packed:.1%} real tokens; {supervised:.1%} of them supervised")
    shuffled = np.random.default_rng(0).permutation(sizes)
    for batch in (4, 8, 32):
        padded = sizes.sum() / sum(part.max() * len(part) for part in np.split(shuffled, range(batch, len(sizes), batch)))
        print(f"batches of {batch} padded to their longest: {padded:.1%}; packing does {packed / padded:.2f} x the useful tokens")


def useful_tokens(path: str, length: int = 2048, batch: int = 8, steps: int = 4) -> None:
    """Forward and backward of the embedded model over packed rows and over padded batches of the same documents, in turns."""
    from model import load_model

    documents, _ = encode_documents(
        read_dialogs(path), Tokenizer(ROOT / "tiny" / "tokenizer.model"), TEMPLATES["llama2"], max_length=length
    )
    model, packed, real = load_model(ROOT / "tiny"), PackedBatches(documents, length), Counter()
    order, seconds = np.random.default_rng(0).permutation(len(documents)), Counter()

    def rows(step):
        for index in range(4 * step, 4 * step + 4):
            yield packed.batch(0, index), sum(len(documents[i][0]) for i in packed.documents_in(0, index))

    def padded(step):
        chosen = [documents[i] for i in order[step * batch : (step + 1) * batch]]
        longest = max(len(ids) for ids, _ in chosen)
        parts = [PackedBatches([document], longest).batch(0, 0) for document in chosen]
        borders = torch.arange(0, batch * longest + 1, longest, dtype=torch.int32)
        stream = {name: torch.cat([part[name] for part in parts]) for name in ("tokens", "labels")}
        yield stream | {"cu_seqlens": borders}, sum(len(ids) for ids, _ in chosen)

    for step in range(-1, steps):  # the first warms up
        for kind in (rows, padded):
            for inputs, tokens in kind(max(step, 0)):
                started = time.perf_counter()
                model(**inputs).backward()
                if step >= 0:
                    seconds[kind] += time.perf_counter() - started
                    real[kind] += tokens
    speed = {kind: real[kind] / seconds[kind] for kind in seconds}
    print(
        f"\nforward and backward of tiny/, useful tokens/s: packed {speed[rows]:,.0f}, "
        f"batches of {batch} padded {speed[padded]:,.0f}, ratio {speed[rows] / speed[padded]:.2f}",
        flush=True,
    )


def large(path: str, tokenizer_path: str, gigabytes: float) -> None:
    """What train.py does with a file of this size: read and check, tokenise into the cache, pack. Twice, the second time from
    the cache; each in a process of its own. Memory is the anonymous part of the resident set, looked at 50 times a second."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print("\n| file | | seconds | anonymous memory before | at its peak |\n|---|---|---|---|---|", flush=True)
        lines, size, i = Path(path).read_bytes().splitlines(), 0, 0
        with open(f"{folder}/large.jsonl", "wb") as file:
            while size < gigabytes * 1e9:
                size, i = size + file.write(lines[i % len(lines)] + b"\n"), i + 1
        for state in ("first", "from the cache"):
            words = [sys.executable, __file__, "--reading", f"{folder}/large.jsonl", "--tokenizer", tokenizer_path]
            shown = subprocess.run(
                words, check=True, env=os.environ | {"XDG_CACHE_HOME": folder}, stdout=subprocess.PIPE, text=True
            )
            print(f"| {size / 1e9:.2f} GB, {i:,} dialogs | {state} | {shown.stdout.strip()} |", flush=True)


def reading(path: str, tokenizer_path: str) -> None:
    from train import TrainConfig, read_data

    def anonymous() -> float:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    def look():
        while not over.wait(0.02):
            seen.append(anonymous())

    seen, over, started = [anonymous()], threading.Event(), time.perf_counter()
    looking = threading.Thread(target=look)
    looking.start()
    read_data(TrainConfig(data=(path,), tokenizer=tokenizer_path, model_max_length=2048), lambda *_: None)
    over.set()
    looking.join()
    print(f"{time.perf_counter() - started:.0f} | {seen[0]:.0f} MB | {max(seen):.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="a JSONL file of dialogs")
    parser.add_argument("--tokenizer", help="a Llama tokenizer.model")
    parser.add_argument("--dialogs", type=int, nargs="*", default=[10_000, 100_000], help="so many of them are tokenised")
    parser.add_argument("--large", type=float, default=0, metavar="GB", help="also read a file of this size, made of --data")
    parser.add_argument("--near", type=int, nargs="*", default=[10_000, 100_000], help="so many texts are searched")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reading", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return near_speed(options.one)
    if options.reading:
        return reading(options.reading, options.tokenizer)
    if options.data and options.dialogs:
        print("| dialogs | tokens | data.py, tokens/s | fast tokenizer, tokens/s | ratio | CPU, ratio | rows full | theirs |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for n in options.dialogs:
            tokenising(options.data, options.tokenizer, n)
        packing(options.data, options.tokenizer)
        useful_tokens(options.data)
    if options.large:
        large(options.data, options.tokenizer, options.large)
    if options.near:
        print(
            "\n| texts of 200 words | time | texts/s | peak memory, Python and PyTorch included |\n|---|---|---|---|", flush=True
        )
        for n in options.near:
            subprocess.run([sys.executable, __file__, "--one", str(n)], check=True)
        print()
        near_quality()


if __name__ == "__main__":
    main()
