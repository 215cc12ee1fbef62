"""Every benchmark that has a GPU's answer, one after the other, as one page: enough for a GPU rented for ten minutes.

    python benchmarks/all.py --device cuda > page.md

Random weights of the largest model are written once, for all parts. Each part has a share of the time, or what is left of it: it
is told to begin nothing new when four fifths are over, and ended when all are; what it had printed by then stands. A part that
fails does not stop the others: its last words are on the page. On a CPU the same parts run with small models."""

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from turns import weights

ROOT = Path(__file__).resolve().parent.parent
STEP, BOTH = "--contestants ours theirs --rounds 3", "--contestants ours compiled theirs --rounds 3"
# (seconds at most, script, arguments), the first first: most end early, and the last, which compiles, has what they leave
CUDA = (
    (30, "nf4.py", ""),
    (25, "ideas.py", "--preset 7b --tokens 4096"),
    (70, "step.py", f"--preset 7b --methods lora --sequences 4 --length 1024 {BOTH}"),
    (55, "step.py", f"--preset 7b --methods lora --sequences 1 --length 4096 {STEP}"),
    (50, "step.py", f"--preset 7b --methods qlora --sequences 4 --length 1024 {STEP}"),
    (35, "step.py", "--preset 7b --methods full --sequences 4 --length 1024 --contestants ours --rounds 3"),
    (35, "step.py", f"--preset 1b --methods full --sequences 4 --length 1024 {STEP}"),
    (55, "decode.py", "--preset 7b --quantize none nf4 --rounds 3"),
    (90, "memory.py", ""),
    (180, "decode.py", "--preset 7b --quantize none nf4 --how compiled --batch 1 --rounds 2"),
)
CPU = (
    (180, "nf4.py", ""),
    (60, "ideas.py", ""),
    (240, "step.py", "--methods lora full --rounds 3"),
    (120, "decode.py", "--preset 125m"),
)
ALL = {"cuda": 540, "cpu": 660}  # seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="scripts to run, such as step.py")
    options = parser.parse_args()
    end = time.monotonic() + ALL[options.device]
    commit = ""
    if git := shutil.which("git"):
        commit = subprocess.run([git, "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cuda, threads = options.device == "cuda", f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if cuda else threads
    print(f"# {machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}", flush=True)
    largest = "7b" if cuda else "125m"
    parts = [part for part in (CUDA if cuda else CPU) if not options.only or part[1] in options.only]
    with weights(largest, options.device) as folder:
        for seconds, script, arguments in parts:
            print(f"\n## `python benchmarks/{script} {arguments} --device {options.device}`\n", flush=True)
            began, more = time.monotonic(), ["--device", options.device]
            seconds = max(1, min(seconds, int(end - began)))
            if script in ("step.py", "decode.py"):
                more += ["--seconds", str(0.8 * seconds)] + ["--folder", folder] * (largest in arguments or not cuda)
            command = [sys.executable, "-u", str(ROOT / "benchmarks" / script), *shlex.split(arguments), *more]
            part = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
            try:
                words = part.communicate(timeout=seconds)[1]
                ended = "" if part.returncode == 0 else "\n".join(["", "failed:", *words.splitlines()[-3:]])
            except BaseException as error:  # its time is over, or Ctrl-C: its processes leave the GPU too
                os.killpg(part.pid, signal.SIGKILL)
                part.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                ended = f"\nended after its {seconds} s"
            print(f"{ended}\n({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
