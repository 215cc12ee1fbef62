"""A run that is killed with kill -9 at random moments, again and again, against one that nobody disturbs.

    python benchmarks/chaos.py [--kills 50] [--steps 500] [--processes 2] [--method lora] [--seed 0]

The embedded default is trained twice from the same seed; of several processes each holds a shard (--fsdp). The second run has one
of them killed a random while after it began to step, at times in the middle of a save, and is started again with --resume, until
that has happened --kills times; then it may finish. Every row of documents that a rank draws is noted. Printed: how often a save
was cut through, how many steps were done again, how many documents of the steps that counted were left out or seen twice in an
epoch, and whether losses and saved weights are the same to the bit."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("tokens_per_second", "peak_memory_bytes")


def log_of(folder: Path) -> list[dict]:
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in lines]
    except (FileNotFoundError, ValueError):  # not begun, or a line is being written
        return []


def train_and_note(path: str):
    """train.py, with every row of training data that this process draws written into a file."""
    sys.path.insert(0, str(ROOT))
    import train
    from data import PackedBatches

    batch = PackedBatches.batch

    def noted(self, epoch, index):
        if self.shuffle:  # training data; what is held out keeps its order
            with open(path, "a") as file:
                file.write(json.dumps([epoch, index, len(self), list(self.documents_in(epoch, index))]) + "\n")
        return batch(self, epoch, index)

    PackedBatches.batch = noted
    train.main()


def lost_and_doubled(attempts: list[Path], rows_per_step: int, steps: int) -> tuple[int, int]:
    """Documents that the steps of the finished run left out of an epoch, or saw twice in it. A step counts in the last attempt
    that did it."""
    counted = {}
    for attempt in attempts:
        drawn = [json.loads(line) for line in attempt.read_text().splitlines()] if attempt.exists() else []
        done = {}
        for epoch, index, rows, documents in drawn:
            step = epoch * -(-rows // rows_per_step) + index // rows_per_step
            done.setdefault(step, []).append((epoch, documents))
        counted = {step: what for step, what in counted.items() if step < min(done, default=steps)} | done
    assert sorted(counted) == list(range(steps))
    seen = [Counter() for _ in range(1 + max(epoch for what in counted.values() for epoch, _ in what))]
    for what in counted.values():
        for epoch, documents in what:
            seen[epoch].update(documents)
    everything = seen[0].keys() | set().union(*seen)
    lost = sum(len(everything - epoch.keys()) for epoch in seen[:-1])  # the last epoch may be cut short
    return lost, sum(times - 1 for epoch in seen for times in epoch.values())


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
    parser.add_argument("--steps", type=int, default=500, help="of the run: enough that it does not end before its last kill")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    random.seed(options.seed)
    launch = [sys.executable]
    if options.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    common = "--device cpu --samples 0 --exact_match False --logging_steps 1 --save_steps 2".split()
    common += ["--method", options.method, "--max_steps", str(options.steps), "--fsdp", str(options.processes > 1)]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, attempts = Path(folder) / "whole", Path(folder) / "killed", []

        def start(where, *more):
            words = [*launch, str(Path(__file__)), "--output_dir", str(where), *more]
            attempts.append(Path(folder) / f"drawn-{len(attempts)}")
            environment = os.environ | {"OMP_NUM_THREADS": "1", "NOTE_DRAWN_ROWS": str(attempts[-1])}
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
        lost, doubled = lost_and_doubled(attempts[1:], options.processes, options.steps)
        print("\n| kills | saves cut through | steps done again | documents lost | seen twice | losses equal | weights equal |")
        print("|---|---|---|---|---|---|---|")
        print(f"| {kills} | {cut} | {again} | {lost} | {doubled} | {same_log} | {same} |")
        sys.exit(0 if same_log and same and not lost + doubled else 1)


if __name__ == "__main__":
    train_and_note(os.environ["NOTE_DRAWN_ROWS"]) if "NOTE_DRAWN_ROWS" in os.environ else main()
