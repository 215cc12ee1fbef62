"""Data: tokenising and packing beside transformers' fast tokenizer and a plain loop; near-duplicates: speed, memory, and how many
are found and how many wrongly.

    python benchmarks/data.py --data no_robots_test.jsonl --tokenizer llama2_tokenizer.model [--near 10000 100000 1000000]

Tokenising: the file's dialogs in the llama2 template, repeated to 5,000. Theirs is one call of the fast tokenizer on all turns,
written out as Meta does, and a loop that appends each to the last row or opens another. Each is timed three times in turns and
the best counts. Near-duplicates: texts of 200 words drawn as words of a language are (Zipf); for the quality each is planted
once more with 1, 3 or 10 % of its words replaced. Each size is a process of its own: its memory is its own."""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

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


def best_of_three(contestants: dict) -> dict:
    seconds = {}
    for _ in range(3):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds.get(name, np.inf), time.perf_counter() - started)
    return seconds


def tokenising(path: str, tokenizer_path: str, length: int = 2048) -> None:
    from transformers import LlamaTokenizerFast

    dialogs = list(read_dialogs(path))
    dialogs = (dialogs * (1 + 5000 // len(dialogs)))[:5000]
    tokenizer, template = Tokenizer(tokenizer_path), TEMPLATES["llama2"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        fast = LlamaTokenizerFast.from_pretrained(folder)

    def ours():
        documents, _ = encode_documents(dialogs, tokenizer, template, max_length=length)
        return documents, PackedBatches(documents, length)

    def theirs():
        pieces = [write_dialog(dialog, template) for dialog in dialogs]
        encoded = iter(fast([piece.text for written in pieces for piece in written], add_special_tokens=False)["input_ids"])
        rows = [[]]
        for written in pieces:
            document = []
            for piece in written:
                document += [1] * piece.begins + next(encoded) + [2] * piece.reply
            if len(rows[-1]) + len(document) > length:
                rows.append([])
            rows[-1] += document[:length]
        return rows

    seconds = best_of_three({"ours": ours, "theirs": theirs})
    documents, batches = ours()
    sizes = np.array([len(ids) for ids, _ in documents])
    learned = sum(int((labels[1:] != -100).sum()) for _, labels in documents)
    tokens = sizes.sum()
    print(f"| {len(dialogs):,} dialogs, {tokens:,} tokens | seconds | tokens/s | rows full |\n|---|---|---|---|")
    for name, full in (("ours", tokens / len(batches) / length), ("theirs", tokens / len(theirs()) / length)):
        print(f"| {name} | {seconds[name]:.2f} | {tokens / seconds[name]:,.0f} | {full:.1%} |")
    once = sizes[: len(list(read_dialogs(path)))]
    order = np.random.default_rng(0).permutation(len(once))
    packed = once.sum() / (len(PackedBatches(documents[: len(once)], length)) * length)
    print(f"\nthe file once, rows of {length:,}: {packed:.1%} real tokens; {learned / tokens:.1%} of them learned")
    for batch in (4, 8, 32):
        padded = once.sum() / sum(
            once[order[i : i + batch]].max() * len(order[i : i + batch]) for i in range(0, len(once), batch)
        )
        print(f"batches of {batch} padded to their longest: {padded:.1%}; packing does {packed / padded:.2f} x the useful tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--tokenizer")
    parser.add_argument("--near", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return near_speed(options.one)
    if options.data:
        tokenising(options.data, options.tokenizer)
    print("\n| texts of 200 words | time | texts/s | peak memory, Python and PyTorch included |\n|---|---|---|---|", flush=True)
    for n in options.near:
        subprocess.run([sys.executable, __file__, "--one", str(n)], check=True)
    print()
    near_quality()


if __name__ == "__main__":
    main()
