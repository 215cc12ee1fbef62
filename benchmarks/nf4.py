"""NF4 on this machine: its error, and how long a weight takes to be made again.

    python benchmarks/nf4.py [--device cuda]

Prints the error of each format; for three shapes of Llama's linears the time and bandwidth of dequantize_nf4 to bf16 and fp32,
and of the product of 1 and 16 rows with a packed weight; for one, of packing it and of a step of the 8-bit AdamW. All beside a
plain copy of as many bytes and, where it is installed, bitsandbytes: in turns, in one process, the fastest of several rounds,
every call on other bytes than the cache holds."""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import load_model  # noqa: E402
from quant import AdamW8bit, Int8Linear, dequantize_nf4, nf4_linear_op, quantize_nf4  # noqa: E402

try:
    import bitsandbytes.functional as bitsandbytes
    from bitsandbytes.optim import AdamW8bit as TheirAdamW
except ImportError:
    bitsandbytes = TheirAdamW = None


def errors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "NF4": dequantize_nf4(quantize_nf4(weight, double_quant=False)),
        "NF4, double quantisation": dequantize_nf4(quantize_nf4(weight)),
        "int8, one scale a row": Int8Linear(weight).dequantize(torch.float32),
    }


def seconds(functions: dict, device: str, rounds: int = 7) -> dict[str, float]:
    """Seconds a call of each function, the fastest of several rounds taken in turns. A function is given the number of its call,
    to choose by it among copies of its input that together do not fit the cache."""
    best, calls = dict.fromkeys(functions, float("inf")), 24 if device == "cuda" else COPIES["cpu"]
    for _ in range(rounds):
        for name, function in functions.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for call in range(calls):
                    function(call)
                end.record()
                torch.cuda.synchronize()
                taken = start.elapsed_time(end) / 1000
            else:
                began = time.perf_counter()
                for call in range(calls):
                    function(call)
                taken = time.perf_counter() - began
            best[name] = min(best[name], taken / calls)
    return best


COPIES = {"cpu": 2, "cuda": 12}  # 12 x 8.7 MB of the smallest shape: beyond the 50 MB of a H100's cache


def contest(what: str, shape, moved: float, functions: dict, device: str) -> None:
    """Print a row: ours beside a copy that reads and writes as many bytes (`moved` in all) and bitsandbytes."""
    source = torch.empty(COPIES[device], int(moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source[0])
    functions["copy"] = lambda call: target.copy_(source[call % len(source)])
    taken = seconds(functions, device)
    ours, beside = taken["ours"], taken.get("bitsandbytes")
    other = f"{beside * 1e3:.3f} | {beside / ours:.2f}" if beside else "not installed | "
    speed = f"{ours * 1e3:.3f} | {moved / ours / 1e9:.1f} | {taken['copy'] / ours:.0%}"
    print(f"| {what} | {shape[0]} x {shape[1]} | {speed} | {other} |", flush=True)


def packing_and_stepping(shape: tuple[int, int], device: str) -> None:
    """The rows of a bf16 weight that is packed, and of one that is trained."""
    numel, count = shape[0] * shape[1], COPIES[device]
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(count)]
    functions = {"ours": lambda call: quantize_nf4(weights[call % count])}
    if bitsandbytes:
        how = {"quant_type": "nf4", "compress_statistics": True}
        functions["bitsandbytes"] = lambda call: bitsandbytes.quantize_4bit(weights[call % count], **how)
    contest("bf16 to NF4", shape, numel * (2 + 4.127 / 8), functions, device)
    weight, functions = torch.nn.Parameter(weights[0]), {}  # with gradient and moments too large for the cache
    weight.grad = torch.randn_like(weight)
    for name, kind in (("ours", AdamW8bit), ("bitsandbytes", TheirAdamW)):
        if kind:
            optimizer = kind([weight], lr=1e-4)
            functions[name] = lambda call, optimizer=optimizer: optimizer.step()
    contest("8-bit AdamW's step, bf16", shape, numel * (3 * 2 + 4 * 1), functions, device)


def main():
    parser = argparse.ArgumentParser(description="The error of NF4, and the speed of making a weight from it.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n")
    print("| error, in units of the standard deviation | mean absolute | mean squared |\n|---|---|---|")
    layer = load_model(ROOT / "tiny").layers[0].feed_forward.w1.weight.detach()
    for of, weight in (("normal data", torch.randn(1024, 4096)), ("tiny's w1", layer)):
        for name, back in errors(weight).items():
            error = (back - weight) / weight.std()
            print(f"| {name}, {of} | {error.abs().mean():.5f} | {error.pow(2).mean():.6f} |")

    print("\n| | shape | ms | GB/s | of copy | bitsandbytes, ms | speed, ours / theirs |\n|---|---|---|---|---|---|---|")
    packing_and_stepping((4096, 4096), device)
    for shape in ((4096, 4096), (4096, 11008), (8192, 28672)):
        numel = shape[0] * shape[1]
        for dtype in (torch.bfloat16, torch.float32):
            weights = [torch.randn(shape, device=device, dtype=dtype) for _ in range(COPIES[device])]
            packed = [quantize_nf4(weight) for weight in weights]
            functions = {"ours": lambda call, packed=packed, dtype=dtype: dequantize_nf4(packed[call % len(packed)], dtype)}
            if bitsandbytes:
                theirs = [bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in weights]
                functions["bitsandbytes"] = lambda call, theirs=theirs: bitsandbytes.dequantize_4bit(*theirs[call % len(theirs)])
            del weights
            moved = numel * (4.127 / 8 + dtype.itemsize)  # codes and scales read, weights written
            contest(f"weight to {str(dtype)[6:]}", shape, moved, functions, device)
            if dtype != torch.bfloat16:
                continue
            for rows in (1, 16):
                x = torch.randn(rows, shape[1], device=device, dtype=dtype)
                parts = [(p.data, p.absmax, p.nested, p.offset, p.shape) for p in packed]
                functions = {"ours": lambda call, x=x, parts=parts: nf4_linear_op(x, *parts[call % len(parts)])}
                if bitsandbytes:
                    functions["bitsandbytes"] = lambda call, x=x, theirs=theirs: matmul_4bit(x, *theirs[call % len(theirs)])
                contest(f"product with {rows} row{'s' * (rows > 1)}, bf16", shape, numel * 4.127 / 8, functions, device)


def matmul_4bit(x, data, state):
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, data.t(), quant_state=state)


if __name__ == "__main__":
    main()
