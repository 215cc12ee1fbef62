"""Predicted against measured memory of real training steps: python benchmarks/memory.py --device cuda

Each configuration runs in a process of its own, with random weights and every position supervised: the worst a row can be.
On CUDA the measure is torch.cuda.max_memory_allocated over two steps and the allocator's reserved bytes; with --device cpu, at
small sizes, it is the tracker's count on real tensors. Prints a markdown table for RESULTS.md."""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memory
from model import PRESETS
from train import Rehearsal, TrainConfig

AGAIN = {"gradient_checkpointing": True}
METHODS = {
    "full": {"method": "full"},
    "full, pure bf16, 8-bit AdamW": {"method": "full", "optim": "adamw_8bit", "pure_bf16": True},
    "lora": {},
    "lora, int8": {"quantize": "int8"},
    "qlora": {"method": "qlora", "quantize": "nf4"},
}
CUDA = [  # preset, method, tokens, gradient checkpointing
    ("125m", "full", 512, False),
    ("125m", "full", 4096, False),
    ("125m", "lora", 2048, False),
    ("125m", "lora", 8192, True),
    ("1b", "full", 512, False),
    ("1b", "full", 2048, True),
    ("1b", "lora", 2048, False),
    ("1b", "lora", 8192, True),
    ("1b", "qlora", 4096, False),
    ("1b", "lora, int8", 2048, True),
    ("7b", "lora", 512, False),
    ("7b", "lora", 2048, False),
    ("7b", "lora", 2048, True),
    ("7b", "lora", 8192, True),
    ("7b", "qlora", 1024, True),
    ("7b", "qlora", 2048, True),
    ("7b", "qlora", 2048, False),
    ("7b", "qlora", 8192, True),
    ("7b", "full", 2048, True),
    ("7b", "full, pure bf16, 8-bit AdamW", 2048, True),
]
CPU = [("125m", method, 256, again) for method in METHODS for again in (False, True)]


def one(device: torch.device, preset: str, method: str, tokens: int, again: bool) -> dict:
    """{predicted, measured, predicted_reserved, measured_reserved} in bytes; the measured ones None if it ran out of memory."""
    gpu, sizes = None, PRESETS[preset]
    if device.type == "cuda":
        gpu = memory.GPU.here(device)
    batch = -(-tokens // sizes.max_seq_len)
    flags = {"dtype": "bf16" if gpu else "fp32", "model_max_length": tokens // batch, "per_device_train_batch_size": batch}
    pure = METHODS[method].get("pure_bf16") and {"dtype": "bf16"}
    config = TrainConfig(**flags | METHODS[method] | (pure or {}) | {"gradient_checkpointing": again})
    line = memory.predict(Rehearsal(config, sizes, torch.device("cpu"), gpu is not None), gpu)
    gc.collect()
    row = {"predicted": line.peak, "predicted_reserved": line.reserved, "measured": None, "measured_reserved": None}
    try:
        real = memory.measure(Rehearsal(config, sizes, device), device)
        row |= {"measured": real.peak, "measured_reserved": real.reserved}
    except torch.OutOfMemoryError:
        pass
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a configuration as JSON: measured in this process
    mine = parser.parse_args()
    if mine.one:
        return print(json.dumps(one(torch.device(mine.device), *json.loads(mine.one))))

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if mine.device == 'cuda' else 'CPU'}\n")
    print("| model | method | tokens | checkpointing | predicted | measured | error | reserved: predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for setting in CUDA if mine.device == "cuda" else CPU:
        command = [sys.executable, __file__, "--device", mine.device, "--one", json.dumps(setting)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {' | '.join(map(str, setting))} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} |")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        cells = []
        for kind in ("", "_reserved"):
            predicted, measured = row[f"predicted{kind}"], row[f"measured{kind}"]
            error = predicted / measured - 1 if predicted and measured else None
            if error is not None and not kind:
                worst = max(worst, abs(error))
            out = "out of memory" if kind == "" and not measured else ""
            cells += [f"{predicted / 1e9:.3f}" if predicted else "", f"{measured / 1e9:.3f}" if measured else out]
            cells.append("" if error is None else f"{error:+.2%}")
        preset, method, tokens, again = setting
        print(f"| {preset} | {method} | {tokens:,} | {'on' if again else 'off'} | {' | '.join(cells)} |", flush=True)
    print(f"\nGB (10^9 bytes). Largest error of the allocated peak: {worst:.2%}.")


if __name__ == "__main__":
    main()
