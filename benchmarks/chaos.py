"""A run that is killed with kill -9 at random moments, again and again, against one that nobody disturbs.

    python benchmarks/chaos.py [--kills 50] [--steps 200] [--processes 2] [--method lora] [--seed 0] [--async_save]

The embedded default is trained twice from the same seed; of several processes each holds a shard (--fsdp). The second run has one
of them killed a random while after it began to step, at times in the middle of a save, and is started again with --resume, until
that has happened --kills times; then it may finish. Every row of documents that a rank draws is noted. Printed: how often a save
was cut through, how many steps were done again, how many documents of the steps that counted were left out or seen twice in an
epoch, and whether losses and saved weights are the same to the bit.

Processes are forked from this one, which has imported train.py: fifty starts of Python would take longer than all else."""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads would not survive a fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sizing.rehearsal  # noqa: F401  train.py imports it when it begins
import train
from data import PackedBatches

TIMES = ("tokens_per_second", "peak_memory_bytes")
UNDISTURBED = 5  # steps at most between the beginning of an attempt's first and its kill


def log_of(folder: Path) -> list[dict]:
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [{key: x for key, x in json.loads(line).items() if key not in TIMES} for line in lines]
    except (FileNotFoundError, ValueError):  # not begun, or a line is being written
        return []


def start(processes: int, drawn: Path, errors: Path, words: list[str]) -> list[int]:
    """Fork the ranks of `train.py words`; `drawn` gets every row of training data that they draw. Their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                if processes > 1:  # what torchrun would say
                    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                sys.argv = ["train.py", *words]
                note_rows(drawn)
                train.main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    return pids


def note_rows(path: Path):
    batch = PackedBatches.batch

    def noted(self, epoch, index):
        if self.shuffle:  # training data; what is held out keeps its order
            with open(path, "a") as file:
                file.write(json.dumps([epoch, index, len(self), list(self.documents_in(epoch, index))]) + "\n")
        return batch(self, epoch, index)

    PackedBatches.batch = noted


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
    everything = set().union(*seen)
    lost = sum(len(everything - epoch.keys()) for epoch in seen[:-1])  # the last epoch may be cut short
    return lost, sum(times - 1 for epoch in seen for times in epoch.values())


def ended(pids: list[int]) -> list[int]:
    """Wait for all; their exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main():
    parser = argparse.ArgumentParser(description="Kill a run at random moments and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200, help="of the run: enough that it does not end before its last kill")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--async_save", action="store_true", help="checkpoints are written while the run goes on")
    options = parser.parse_args()
    random.seed(options.seed)
    common = "--device cpu --samples 0 --exact_match False --logging_steps 1 --save_steps 2".split()
    common += ["--method", options.method, "--max_steps", str(options.steps), "--fsdp", str(options.processes > 1)]
    common += ["--async_save", str(options.async_save)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, killed, errors = folder / "whole", folder / "killed", folder / "errors"
        began = time.monotonic()
        codes = ended(start(options.processes, folder / "undisturbed", errors, ["--output_dir", str(whole), *common]))
        assert not any(codes), errors.read_text()
        longest = UNDISTURBED * (time.monotonic() - began) / options.steps
        kills = cut = again = 0
        attempts = []
        while True:
            attempts.append(folder / f"drawn-{len(attempts)}")
            more = ["--resume"] if (killed / "run.json").exists() else common
            pids = start(options.processes, attempts[-1], errors, ["--output_dir", str(killed), *more])
            if kills == options.kills:
                assert not any(ended(pids)), errors.read_text()
                break
            while not attempts[-1].exists():  # until the first row is drawn
                time.sleep(0.01)
            time.sleep(random.uniform(0, longest))
            os.kill(random.choice(pids), signal.SIGKILL)
            codes = ended(pids)  # the other ranks find the connection closed
            assert -signal.SIGKILL in codes and 0 not in codes, (
                f"the run ended by itself after {kills} kills: {errors.read_text()}"
            )
            kills += 1
            cut += bool(list(killed.glob("*.tmp")))
            steps = max((row["step"] for row in log_of(killed)), default=0)
            saved = max(
                (path.name[11:] for path in killed.glob("checkpoint-*") if path.name[11:].isdigit()), key=int, default="0"
            )
            again += steps - int(saved)
            print(f"kill {kills}: in step {steps}, step {saved} is saved", flush=True)
        same_log = log_of(whole) == log_of(killed)
        files = [path.name for path in whole.glob("*.safetensors")]
        same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)
        lost, doubled = lost_and_doubled(attempts, options.processes, options.steps)
        print("\n| kills | saves cut through | steps done again | documents lost | seen twice | losses equal | weights equal |")
        print("|---|---|---|---|---|---|---|")
        print(f"| {kills} | {cut} | {again} | {lost} | {doubled} | {same_log} | {same} |")
        sys.exit(0 if same_log and same and not lost + doubled else 1)


if __name__ == "__main__":
    main()
