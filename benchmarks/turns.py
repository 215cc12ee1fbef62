"""Contestants that take turns: each is the same script again, a process of its own that waits for a line on stdin and answers it
with a line of JSON. Nobody's memory or threads are in another's way, and what disturbs the machine disturbs all of them alike."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import Tokenizer  # noqa: E402
from model import PRESETS, random_model, save_hf  # noqa: E402


class Contestant:
    """A process of sys.argv's script with more arguments, perhaps by the Python of another environment. One that ends before it
    was asked to is `failed`: its last words."""

    def __init__(self, name: str, arguments: list[str], python: str = sys.executable):
        self.name, self.failed, self.errors = name, "", tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, *sys.argv, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8"
        )

    def say(self, line) -> None:
        if not self.failed:
            with contextlib.suppress(BrokenPipeError):  # why, is found when its answer is waited for
                print(line, file=self.process.stdin, flush=True)

    def hear(self):
        """Its next answer; None if it has failed."""
        while not self.failed and (line := self.process.stdout.readline()):
            if line.startswith(("{", "[")):  # libraries print on stdout as well
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        if not self.failed and (self.process.wait() or not self.process.stdin.closed):
            self.errors.seek(0)
            words = [line.strip() for line in self.errors if line.strip()]
            self.failed = words[-1][:200].replace("|", "/") if words else f"ended with code {self.process.returncode}"
        return None

    def ask(self, line):
        self.say(line)
        return self.hear()

    def leave(self):
        """No more lines; its last answer, if it has one."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        last = self.hear()
        self.process.wait()
        return last


def answer(line) -> None:
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def weights(preset: str, device: str, folder: str | None = None):
    """The folder of a model of the preset's shape: the one given, or for so long one with random weights in bf16, and some
    tokenizer, which SFTTrainer asks for."""
    with tempfile.TemporaryDirectory() if not folder else contextlib.nullcontext(folder) as place:
        if not folder:
            torch.manual_seed(0)
            save_hf(random_model(PRESETS[preset], device=device, dtype=torch.bfloat16), place)
            Tokenizer(ROOT / "tiny" / "tokenizer.model").save(place, PRESETS[preset].max_seq_len)
            if device == "cuda":
                torch.cuda.empty_cache()
        yield place
