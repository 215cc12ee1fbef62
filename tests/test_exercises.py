"""exercises/: each is red in this repository, and a solution of a few lines turns it green.

Whoever wants to do them should not read on: the solutions stand here."""

import importlib
import math
import re
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch

import data
import generate
import lora
import model
import quant
import train

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()


def window(plain=model.attention_over_keys):
    def attention_over_keys(q, k, v, method, window=None):
        if window is None:
            return plain(q, k, v, method)
        (heads, new, _), (kv_heads, seen, _) = q.shape, k.shape
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new).triu(seen - new - window + 1)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
        return model.textbook_attention(q, k, v, mask)

    return model, "attention_over_keys", attention_over_keys


def positions(plain=model.rope_table):
    return model, "rope_table", lambda positions, config, squeeze=1.0: plain(positions / squeeze, config)


def tied():
    return model, "tie", lambda llama: setattr(llama.output, "weight", llama.tok_embeddings.weight)


def noise():
    def add_noise(llama, alpha):
        def hook(module, _, x):
            return x + torch.empty_like(x).uniform_(-1, 1) * alpha / math.sqrt(x.numel()) if module.training else x

        llama.tok_embeddings.register_forward_hook(hook)

    return model, "add_noise", add_noise


def plus():
    def lora_plus(adapted, rate, ratio):
        named = lora.lora_parameters(adapted).items()
        return [
            {"params": [weight for name, weight in named if name.endswith(end)], "lr": lr}
            for end, lr in (("lora_A", rate), ("lora_B", rate * ratio))
        ]

    return lora, "lora_plus", lora_plus


def magnitude():
    def dora(weight, update, magnitude):
        moved = weight + update
        return moved * (magnitude / moved.norm(dim=1))[:, None]

    return lora, "dora", dora


def even_levels():
    return quant, "even_levels", lambda: torch.linspace(-1, 1, 16)


def template():
    chatml = data.Template(
        system="<|im_start|>system\n{system}<|im_end|>\n",
        user="{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
        assistant="{assistant}<|im_end|>\n",
        stop=("<|im_end|>",),
    )
    return data, "TEMPLATES", data.TEMPLATES | {"chatml": chatml}


def best_fit():
    def pack(sizes, row_tokens, order):
        rows, room = [], []
        for i in order:
            fitting = [row for row in range(len(rows)) if room[row] >= sizes[i]]
            row = min(fitting, key=room.__getitem__, default=len(rows))
            if row == len(rows):
                rows.append(array("i"))
                room.append(row_tokens)
            rows[row].append(i)
            room[row] -= sizes[i]
        return rows

    return data, "pack", pack


def schedule(plain=train.learning_rate):
    def learning_rate(config, step, total, peak):
        if config.lr_scheduler_type != "wsd" or step < math.ceil(config.warmup_ratio * total):
            return plain(config, step, total, peak)
        return peak * min(1, (total - step) / (0.2 * total))

    return train, "learning_rate", learning_rate


def typical():
    def typical(probs, mass):
        surprise = -probs.log()
        order = (surprise - (probs * surprise).sum(-1, keepdim=True)).abs().argsort(-1)
        nearest = probs.gather(-1, order)
        kept = nearest.masked_fill(nearest.cumsum(-1) - nearest >= mass, 0)
        return torch.zeros_like(probs).scatter(-1, order, kept)

    return generate, "typical", typical


def score():
    def score(llama, prompt, reply):
        logits = llama(torch.tensor(prompt + reply))[len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(reply)[:, None]).sum()

    return generate, "score", score


def bytes_(trained=True):
    exercise = importlib.import_module("exercises.memory_test")
    T, C, F = exercise.T, exercise.C, exercise.F
    # w1 x and w3 x; silu of one times the other only where w2 wants a gradient; and the result.
    return exercise, "ALL_TRAINED" if trained else "ALL_FROZEN", 4 * ((3 if trained else 2) * T * F + T * C)


EXERCISES = {  # file, name: what solves it, and what the test is called with
    ("model", "window"): (window, ()),
    ("model", "positions"): (positions, ()),
    ("model", "tied"): (tied, ()),
    ("model", "noise"): (noise, (True,)),
    ("lora", "plus"): (plus, ()),
    ("lora", "magnitude"): (magnitude, ()),
    ("quant", "even_levels"): (even_levels, ()),
    ("data", "template"): (template, ()),
    ("data", "best_fit"): (best_fit, ()),
    ("train", "schedule"): (schedule, ()),
    ("generate", "typical"): (typical, ()),
    ("generate", "score"): (score, ()),
    ("memory", "bytes"): (bytes_, (True, "ALL_TRAINED")),
}


@pytest.mark.parametrize(("file", "name"), EXERCISES)
def test_an_exercise_is_red_and_its_solution_turns_it_green(file, name, monkeypatch):
    exercise = getattr(importlib.import_module(f"exercises.{file}_test"), f"test_{name}")
    solution, arguments = EXERCISES[file, name]
    with pytest.raises((AssertionError, AttributeError, KeyError, TypeError)):
        exercise(*arguments)
    monkeypatch.setattr(*solution(), raising=False)
    exercise(*arguments)


def test_the_cases_that_an_exercise_has_beside_turn_green_too(monkeypatch):
    exercise = importlib.import_module("exercises.memory_test")
    with pytest.raises(AssertionError):
        exercise.test_bytes(False, "ALL_FROZEN")
    monkeypatch.setattr(*bytes_(trained=False))
    exercise.test_bytes(False, "ALL_FROZEN")
    monkeypatch.setattr(*noise(), raising=False)
    importlib.import_module("exercises.model_test").test_noise(False)


def test_they_are_collected_only_when_asked_for_and_readme_lists_them():
    pytest_here = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run([*pytest_here, "exercises"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    tests = {(file, name) for file, name in re.findall(r"exercises/(\w+)_test\.py::test_(\w+)", found)}
    assert tests == EXERCISES.keys()
    assert all(f"| `{file}` | `{name}` |" in README for file, name in EXERCISES)
    assert 'testpaths = ["tests"]' in (REPOSITORY / "pyproject.toml").read_text()
