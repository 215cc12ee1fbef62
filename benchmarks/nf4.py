"""NF4 on this machine: its error, and how long a weight takes to be made again.

    python benchmarks/nf4.py [--device cuda]

Prints the error of each format, and for three shapes of Llama's linears the time and bandwidth of dequantize_nf4 to bf16 beside a
plain copy of as many bytes and, where it is installed, bitsandbytes: in turns, in one process, the fastest of several rounds."""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import load_model  # noqa: E402
from quant import Int8Linear, dequantize_nf4, quantize_nf4  # noqa: E402

try:
    import bitsandbytes.functional as bitsandbytes
except ImportError:
    bitsandbytes = None


def errors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "NF4": dequantize_nf4(quantize_nf4(weight, double_quant=False)),
        "NF4, double quantisation": dequantize_nf4(quantize_nf4(weight)),
        "int8, one scale a row": Int8Linear(weight).dequantize(torch.float32),
    }


def seconds(functions: dict, device: str, rounds: int = 7) -> dict[str, float]:
    """The fastest of several rounds of each, taken in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                taken = start.elapsed_time(end) / 1000
            else:
                began = time.perf_counter()
                function()
                taken = time.perf_counter() - began
            best[name] = min(best[name], taken)
    return best


def main():
    parser = argparse.ArgumentParser(description="The error of NF4, and the speed of making a weight from it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n")
    print("| error, in units of the standard deviation | mean absolute | mean squared |\n|---|---|---|")
    layer = load_model(ROOT / "tiny").layers[0].feed_forward.w1.weight.detach()
    for of, weight in (("normal data", torch.randn(1024, 4096)), ("tiny's w1", layer)):
        for name, back in errors(weight).items():
            error = (back - weight) / weight.std()
            print(f"| {name}, {of} | {error.abs().mean():.5f} | {error.pow(2).mean():.6f} |")

    print("\n| to bf16 | ms | GB/s | of copy | bitsandbytes, ms | ratio |\n|---|---|---|---|---|---|")
    for shape in ((4096, 4096), (4096, 11008), (8192, 28672)):
        weight = torch.randn(shape, device=device).bfloat16()
        packed = quantize_nf4(weight, double_quant=False)
        moved = weight.numel() * (0.5 + 4 / 64 + 2)  # codes and scales read, bf16 written
        source = torch.empty(int(moved // 2), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        functions = {
            "ours": lambda packed=packed: dequantize_nf4(packed, torch.bfloat16),
            "copy": lambda source=source, target=target: target.copy_(source),
        }
        if bitsandbytes:
            theirs = bitsandbytes.quantize_4bit(weight, quant_type="nf4")
            functions["bitsandbytes"] = lambda theirs=theirs: bitsandbytes.dequantize_4bit(*theirs)
        taken = seconds(functions, device)
        ours, beside = taken["ours"], taken.get("bitsandbytes")
        other = f"{beside * 1e3:.1f} | {beside / ours:.2f}" if beside else "not installed | "
        print(
            f"| {shape[0]} x {shape[1]} | {ours * 1e3:.1f} | {moved / ours / 1e9:.1f} | {taken['copy'] / ours:.0%} | {other} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
