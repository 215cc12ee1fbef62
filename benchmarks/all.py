"""Every benchmark that has a GPU's answer, one after the other, as one page: enough for a GPU rented for ten minutes.

    python benchmarks/all.py --device cuda > page.md

Each part has its share of the nine minutes and is ended when that is over; what it had printed by then stands. A part that
fails does not stop the others: its last words are on the page. On a CPU the same parts run with small models."""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# (seconds, script, arguments); the sum of the seconds is under nine minutes
CUDA = (
    (45, "nf4.py", ""),
    (
        120,
        "step.py",
        "--preset 7b --methods lora qlora --sequences 4 --length 1024 --rounds 4 --contestants ours compiled theirs",
    ),
    (75, "step.py", "--preset 7b --methods lora --sequences 1 --length 4096 --rounds 4"),
    (60, "step.py", "--preset 1b --methods full lora qlora --sequences 4 --length 1024 --rounds 4"),
    (120, "memory.py", ""),
    (90, "decode.py", "--preset 7b --quantize none nf4"),
)
CPU = (
    (120, "nf4.py", ""),
    (240, "step.py", "--methods lora full --rounds 3"),
    (120, "decode.py", "--preset 125m"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="scripts to run, such as step.py")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    machine = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"# {machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}", flush=True)
    for seconds, script, arguments in CUDA if options.device == "cuda" else CPU:
        if options.only and script not in options.only:
            continue
        print(f"\n## `python benchmarks/{script} {arguments} --device {options.device}`\n", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-u", str(ROOT / "benchmarks" / script), *arguments.split(), "--device", options.device]
        try:
            result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds)
            ended = "" if result.returncode == 0 else "\n".join(["", "failed:", *result.stderr.splitlines()[-3:]])
        except subprocess.TimeoutExpired:
            ended = f"\nended after its {seconds} s"
        print(f"{ended}\n({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
