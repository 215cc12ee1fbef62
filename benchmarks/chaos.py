"""A sharded run whose ranks are killed with kill -9 at random moments, again and again, against one that nobody disturbs.

    python benchmarks/chaos.py [--kills 50] [--processes 2] [--method lora]

The embedded default is trained twice from the same seed. The second run is killed a random while after it began to step, at times
in the middle of a save, and started again with --resume, until it has died --kills times; then it may finish. Printed: how
often a save was cut through, how many steps had to be done again, and whether log and saved weights are the same to the bit. The
log holds every step's loss and its number of supervised tokens: a document lost or seen twice would change both."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("tokens_per_second", "peak_memory_bytes")


def log_of(folder: Path) -> list[dict]:
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in lines]
    except (FileNotFoundError, ValueError):  # not begun, or a line is being written
        return []


def ranks_of(folder: Path) -> list[int]:
    """The process numbers of the run's ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return found


def main():
    parser = argparse.ArgumentParser(description="Kill a run at random moments and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="lora")
    options = parser.parse_args()
    random.seed(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    common = "--fsdp True --device cpu --samples 0 --exact_match False --logging_steps 1 --save_steps 2".split()
    common += ["--method", options.method, "--max_steps", str(10 * options.kills)]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def start(where, *more):
            words = [*launch, str(ROOT / "train.py"), "--output_dir", str(where), *more]
            with open(Path(folder) / "stderr", "w") as errors:
                return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

        assert start(whole, *common).wait() == 0, "the undisturbed run failed"
        kills = cut = again = 0
        while True:
            begun = (killed / "run.json").exists()
            process = start(killed, *(["--resume"] if begun else common))
            if kills == options.kills:
                assert process.wait() == 0, "the run could not be finished"
                break
            resumed_at = len(log_of(killed))
            while process.poll() is None and len(log_of(killed)) <= resumed_at:
                time.sleep(0.01)
                resumed_at = min(resumed_at, len(log_of(killed)))
            time.sleep(random.uniform(0, 1.5))
            ranks = ranks_of(killed)
            if process.poll() is not None or not ranks:
                said = (Path(folder) / "stderr").read_text()
                raise SystemExit(f"{said}\nthe run ended by itself after {kills} kills, code {process.poll()}")
            os.kill(random.choice(ranks), signal.SIGKILL)
            process.wait()
            kills += 1
            cut += bool(list(killed.glob("*.tmp")))
            steps = max((row["step"] for row in log_of(killed)), default=0)
            saved = max((int(path.name[11:]) for path in killed.glob("checkpoint-*") if path.name[11:].isdigit()), default=0)
            again += steps - saved
            print(f"kill {kills}: in step {steps}, step {saved} is saved", flush=True)
        same_log = log_of(whole) == log_of(killed)
        files = [path.name for path in whole.glob("*.safetensors")]
        same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)
        print("\n| kills | saves cut through | steps done again | rows of the log | log equal | weights equal |")
        print("|---|---|---|---|---|---|")
        print(f"| {kills} | {cut} | {again} | {len(log_of(killed))} | {same_log} | {same} |")
        sys.exit(0 if same_log and same else 1)


if __name__ == "__main__":
    main()
