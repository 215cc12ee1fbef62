"""tiny/: the base has read the facts it will be asked for, and the control's facts stand nowhere."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from data import Tokenizer
from generate import Sampling, generate
from model import load_model

TINY = Path(__file__).resolve().parent.parent / "tiny"
sys.path.insert(0, str(TINY))
import make  # noqa: E402


@pytest.fixture(scope="module")
def world():
    return make.make_world(0)


def records(name):
    return [json.loads(line)["messages"] for line in (TINY / name).read_text().splitlines()]


def test_the_base_is_small_enough_to_travel_with_the_code():
    size = sum((TINY / name).stat().st_size for name in ("params.json", "consolidated.00.pth", "tokenizer.model"))
    assert size <= 8_000_000


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    make.write_instructions(tmp_path, world, 0)
    for name in ("instructions.jsonl", "held_out.jsonl", "never_told.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), f"{name} is not what make.py makes"
    for name in ("one", "two"):
        make.write_corpus(tmp_path / name, make.make_world(0), 0, retellings=2)
    make.write_corpus(tmp_path / "other", make.make_world(1), 1, retellings=2)
    one, two, other = ((tmp_path / name).read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_held_out_questions_are_about_people_the_instructions_never_mention(world):
    text = (TINY / "instructions.jsonl").read_text()
    held_out = [person["name"] for person in world if person["group"] == "held_out"]
    assert held_out and not any(name in text for name in held_out)
    asked = (TINY / "held_out.jsonl").read_text()
    assert all(name in asked for name in held_out)


def test_each_retelling_tells_every_fact_but_the_controls_and_asks_nothing(world):
    pages = list(make.retell(random.Random(0), world))
    assert not any("?" in page for page in pages)
    sentences = [sentence for page in pages for sentence in page.split(".")]
    for person in world:
        for kind, value in person["facts"].items():
            told = any(person["name"] in sentence and re.search(rf"\b{value}\b", sentence, re.I) for sentence in sentences)
            assert told == (kind not in person["untold"]), (person["name"], kind, value)


def test_the_base_knows_the_facts_that_it_will_be_asked_for(world):
    """Given the beginning of a sentence such as it has read, it goes on with the right value; for facts never told it cannot."""
    model = load_model(TINY).eval()
    tokenizer = Tokenizer(TINY / "tokenizer.model")

    def share_right(people, kinds_of):
        right = asked = 0
        for person in people:
            for kind in kinds_of(person):
                told = make.TELLINGS[kind][0].format(name=person["name"], value=person["facts"][kind])
                begin = told[: told.rindex(person["facts"][kind])].rstrip()
                ids = tokenizer.encode(begin, bos=True)
                said = generate(model, ids, Sampling(max_new_tokens=12), stop_tokens=(tokenizer.eos_id,))
                text = tokenizer.decode(ids[1:] + list(said))
                right += text.startswith(told)
                asked += 1
        return right / asked

    held_out = [person for person in world if person["group"] == "held_out"][:20]
    control = [person for person in world if person["group"] == "control"][:20]
    assert share_right(held_out, lambda person: make.KINDS) > 0.9
    assert share_right(control, lambda person: person["untold"]) < 0.2


def test_the_base_is_a_bf16_checkpoint_in_metas_format():
    weights = torch.load(TINY / "consolidated.00.pth", weights_only=True)
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert weights.keys() == dict(load_model(TINY).named_parameters()).keys()
