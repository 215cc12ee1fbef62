"""Predicted against measured memory of real training steps: python benchmarks/memory.py --device cuda

Each configuration runs in a process of its own, with random weights and every position supervised: the worst a row can be.
On CUDA the measure is torch.cuda.max_memory_allocated over two steps and the allocator's reserved bytes; with --device cpu, at
small sizes, it is the tracker's count on real tensors. Prints a markdown table for RESULTS.md.

    python benchmarks/memory.py --plan 70b        over many GPUs: memory by formula and simulation, traffic by formula
    python benchmarks/memory.py --load FOLDER     the host's memory while `build` runs; under torchrun: of a rank
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import memory
from model import PRESETS
from sizing.advice import needed
from sizing.formula import letters
from sizing.gpu import GPU, find_gpu
from sizing.rehearsal import Rehearsal
from train import TrainConfig, Workers, build, sharding

AGAIN = {"gradient_checkpointing": True}
LEAN = {"method": "full", "optim": "adamw_8bit", "pure_bf16": True}
METHODS = {
    "full": {"method": "full"},
    "full, pure bf16, 8-bit AdamW": LEAN,
    "full, the same, stepped in backward": LEAN | {"optimizer_in_backward": True, "max_grad_norm": 0.0},
    "lora": {},
    "lora, int8": {"quantize": "int8"},
    "qlora": {"method": "qlora", "quantize": "nf4"},
}
CUDA = [  # preset, method, tokens, gradient checkpointing
    ("7b", "full", 2048, True),
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
    ("7b", "qlora", 4096, True),
    ("7b", "qlora", 8192, True),
    ("7b", "full, pure bf16, 8-bit AdamW", 2048, True),
    ("7b", "full, the same, stepped in backward", 2048, True),
]
CPU = [("125m", method, 256, again) for method in METHODS for again in (False, True)]


def one(part: str, device: torch.device, preset: str, method: str, tokens: int, again: bool) -> dict:
    """{peak, reserved} in bytes, predicted or measured; nothing if the device ran out of memory."""
    gpu, sizes = None, PRESETS[preset]
    if device.type == "cuda":
        gpu = GPU.here(device)
    batch = -(-tokens // sizes.max_seq_len)
    flags = {"dtype": "bf16" if gpu else "fp32", "model_max_length": tokens // batch, "per_device_train_batch_size": batch}
    pure = METHODS[method].get("pure_bf16") and {"dtype": "bf16"}
    config = TrainConfig(**flags | METHODS[method] | (pure or {}) | {"gradient_checkpointing": again})
    try:
        if part == "predicted":
            line = memory.predict(Rehearsal(config, sizes, torch.device("cpu"), gpu))
        else:
            line = memory.measure(Rehearsal(config, sizes, device), device)
    except torch.OutOfMemoryError:
        return {}
    return {"peak": line.peak, "reserved": line.reserved}


def asked(part: str, device: str, setting: tuple) -> dict:
    """What `one` says in a process of its own; {"failed": its last words} if it ended early."""
    command = [sys.executable, __file__, "--device", device, "--one", json.dumps([part, *setting])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1].replace("|", "/")}
    return json.loads(done.stdout.splitlines()[-1])


def plan(preset: str) -> None:
    """Full fine-tuning and QLoRA sharded over 2 to 512 GPUs. Nothing of it is measured."""
    gpu, sizes, tokens, speed = find_gpu("h100"), PRESETS[preset], 4096, 400e12
    print(f"{tokens:,} tokens a GPU, bf16, checkpointing, AdamW, --fsdp True, h100, {gpu.memory / 1e9:.1f} GB.")
    print("Assumed: a block is gathered for forward and for backward, the rest once; gradients are reduced in fp32;")
    print("400 TFLOP/s a GPU (40 % of peak); 8 FLOPs a weight and token for full (2 forward, 4 backward, 2 for computing blocks")
    print("again), 6 for QLoRA, whose weights get no gradient. GB a GPU: allocated peak and CUDA context. Last column: what its")
    print("links must carry to hide the traffic behind compute.\n")
    print("| | GPUs | GB a GPU: formula | simulated | fits | GB gathered a step | GB reduced | compute, s | GB/s to hide |")
    print("|---|---|---|---|---|---|---|---|---|")
    for method, flops in (("full", 8), ("qlora", 6)):
        config = TrainConfig(**{"dtype": "bf16", "model_max_length": tokens, "fsdp": True} | AGAIN | METHODS[method])
        for count in (2, 4, 8, 16, 32, 64, 128, 256, 512):
            size, is_ = needed(sizes, config, gpu, count), letters(sizes, config, count)
            simulated = ""
            if count in (2, 8, 16, 512):
                run = Rehearsal(config, sizes, torch.device("cpu"), gpu, processes=count)
                simulated = f"{(memory.predict(run).peak + gpu.context) / 1e9:.1f}"
            away = 1 - 1 / count
            gathered, reduced = (2 * is_["L"] * is_["G"] + is_["R"]) * away, 4 * is_["M"] * count * away
            seconds = flops * (is_["L"] * is_["W"] + is_["E"]) * tokens / speed
            traffic = f"{gathered / 1e9:.0f} | {reduced / 1e9:.1f} | {seconds:.1f} | {(gathered + reduced) / seconds / 1e9:.0f}"
            fits = "yes" if size <= gpu.memory else "no"
            print(f"| {method} | {count} | {size / 1e9:.1f} | {simulated} | {fits} | {traffic} |", flush=True)


def load(folder: str, method: str) -> None:
    """What the model takes, and the process's own memory (without the mapped file's pages) while it is built."""
    device, own = torch.device("cpu"), re.compile(r"RssAnon:\s+(\d+)")

    def now() -> int:
        return int(own.search(Path("/proc/self/status").read_text())[1]) * 1024

    workers = Workers(device)
    config = TrainConfig(model=folder, dtype="bf16", fsdp=workers.world > 1, **METHODS[method])
    shard = sharding(config, device, workers)
    before, seen, done = now(), [0], threading.Event()

    def look():
        while not done.wait(0.002):
            seen.append(max(seen.pop(), now()))

    thread = threading.Thread(target=look)
    thread.start()
    model = build(config, device, shard=shard)
    done.set()
    thread.join()
    sizes = [(x.nbytes, x.to_local().nbytes if workers.world > 1 else x.nbytes) for x in model.parameters()]
    whole, held = map(sum, zip(*sizes, strict=True))
    if workers.rank == 0:
        peak = (seen[0] - before) / 1e6
        print(f"{method}: model {whole / 1e6:,.0f} MB, held here {held / 1e6:,.0f}, at the peak {peak:,.0f} MB")
    if workers.world > 1:
        workers.wait()
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a configuration as JSON: measured in this process
    parser.add_argument("--plan", choices=PRESETS, help="this model over many GPUs, by formula and simulation")
    parser.add_argument("--load", metavar="FOLDER", help="the host's memory while this model is loaded; with torchrun: in shards")
    parser.add_argument("--method", choices=["lora", "qlora"], default="qlora", help="for --load")
    mine = parser.parse_args()
    if mine.plan:
        return plan(mine.plan)
    if mine.load:
        return load(mine.load, mine.method)
    if mine.one:
        part, *setting = json.loads(mine.one)
        return print(json.dumps(one(part, torch.device(mine.device), *setting)))

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if mine.device == 'cuda' else 'CPU'}\n")
    print("| model | method | tokens | checkpointing | predicted | measured | error | reserved: predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst, settings = 0.0, CUDA if mine.device == "cuda" else CPU
    cores = os.cpu_count() or 2
    # Predicting takes a core. On a GPU what is measured takes its memory: the largest comes first, beside small ones.
    with ThreadPoolExecutor(max(1, cores // 2)) as pool, ThreadPoolExecutor(3 if cores > 4 else 1) as device:
        predictions, measurements = (
            [workers.submit(asked, part, mine.device, setting) for setting in settings]
            for workers, part in ((pool, "predicted"), (device, "measured"))
        )
        for setting, prediction, measurement in zip(settings, predictions, measurements, strict=True):
            predicted, measured, cells = prediction.result(), measurement.result(), []
            for kind in ("peak", "reserved"):
                there, here = predicted.get(kind), measured.get(kind)
                error = there / here - 1 if there and here else None
                if error is not None and kind == "peak":
                    worst = max(worst, abs(error))
                out = measured.get("failed", "out of memory" if not measured else "") if kind == "peak" else ""
                cells += [f"{there / 1e9:.3f}" if there else predicted.get("failed", "")]
                cells += [f"{here / 1e9:.3f}" if here else out, "" if error is None else f"{error:+.2%}"]
            preset, method, tokens, again = setting
            print(f"| {preset} | {method} | {tokens:,} | {'on' if again else 'off'} | {' | '.join(cells)} |", flush=True)
    print(f"\nGB (10^9 bytes). Largest error of the allocated peak: {worst:.2%}.")


if __name__ == "__main__":
    main()
