"""How long an answer takes: 100 runs of exactly 50 new tokens, the mean wall time with tokenising, and what explains it.

Decoding one sequence reads every weight once a token, so its speed is memory's: GB/s = bytes of weights x tokens/s, beside what
copying a large tensor reaches on the same device, read and written bytes counted. Each run of the program appends a line to a
JSONL, and the table shows all of the file's lines: other --dtype, --quantize and --compile come to stand under each other."""

import json
import time
from pathlib import Path

import torch

from data import DataError, encode_dialog
from generate import Sampling, generate, text_stream
from helping.files import peak_memory, writing
from quant import QUANTIZERS
from talking.cpu import CPUNF4

RUNS, NEW_TOKENS = 100, 50


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 256 MiB, the fastest of ten."""
    source = torch.ones(2**26, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def measure(model, tokenizer, template, text: str) -> dict:
    """A line of the report. The first run warms up, and compiles if it must; it does not count.

    first_s: from the text to the first token; tokens_per_s: of the other 49."""
    sampling, device, weight = Sampling(max_new_tokens=NEW_TOKENS), model.device, model.norm.weight
    totals, firsts = [], []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        prompt, _ = encode_dialog([{"role": "user", "content": text}], tokenizer, template)
        times = []
        tokens = (times.append(time.perf_counter()) or token for token in generate(model, prompt, sampling))
        for _ in text_stream(tokenizer, tokens):
            pass
        if len(times) != NEW_TOKENS:
            raise DataError(
                f"the model's window of {model.config.max_seq_len} leaves no room for {NEW_TOKENS} tokens after the prompt"
            )
        totals.append(time.perf_counter() - began)
        firsts.append(times[0] - began)
    seconds, first = (sum(x[1:]) / RUNS for x in (totals, firsts))
    speed = (NEW_TOKENS - 1) / (seconds - first)
    kinds = [*QUANTIZERS.items(), ("nf4", CPUNF4)]
    read = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
    read += sum(module.scales().nbytes for module in model.modules() if isinstance(module, CPUNF4))
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantize": next((name for name, kind in kinds if kind in map(type, model.modules())), "none"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "compiled": hasattr(model, "compiled_step"),
        "runs": RUNS,
        "new_tokens": NEW_TOKENS,
        "seconds": seconds,
        "first_s": first,
        "tokens_per_s": speed,
        "weights_bytes": read,
        "gb_per_s": read * speed / 1e9,
        "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        "peak_bytes": peak_memory(device),
        "torch": torch.__version__,
    }


def report(voices: list, config) -> None:
    """--latency: append a measurement of the last voice to --out, or latency.jsonl in the folder of run or model, and print all
    its lines as a table."""
    folder = Path((*config.adapter, config.model or ".")[0])
    path, text = Path(config.out or folder / "latency.jsonl"), config.prompt or "Which animal does Pena Marmond keep?"
    try:
        rows = [row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{path} holds other lines than --latency's: name a new --out") from None
    line = {"model": Path(voices[-1].name).resolve().name} | measure(*voices[-1][1:], text)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print("| model | weights | compiled | device | 50 tokens, s | first token, s | tokens/s | GB/s | of a copy | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join([*rows, row(line)]))
    print(f"written to {path}")


def row(line: dict) -> str:
    """A line of the file as one of the table. Raises LookupError or TypeError if it is none."""
    weights = line["dtype"] if line["quantize"] == "none" else f"{line['quantize']}, {line['dtype']}"
    return (
        f"| {line['model']} | {weights} | {'yes' if line['compiled'] else 'no'} | {line['device']} | {line['seconds']:.3f} | "
        f"{line['first_s']:.3f} | {line['tokens_per_s']:.1f} | {line['gb_per_s']:.1f} | "
        f"{line['gb_per_s'] / line['copy_gb_per_s']:.0%} | {line['peak_bytes'] / 1e9:.2f} |"
    )
