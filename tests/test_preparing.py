"""Preparing: what each stage removes and what it leaves alone, that nothing goes uncounted, and what show and stats print."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from data import DataError, read_dialogs
from helping.files import alone
from preparing.pages import text_of
from preparing.records import read_records
from preparing.stages import NearDuplicates, fault, most_diverse, ngrams
from train import TrainConfig, read_data

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"
PROSE = "The ferry leaves at nine and returns before dark, when the lamps along the quay are lit one after another by hand."


def dialog(ask: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]


def prose(rng, n: int) -> list[str]:
    """n words of an invented language: some often, most rarely, as in a real one (Zipf)."""
    return [f"w{int(rank)}" for rank in np.minimum(rng.zipf(1.3, n), 50_000)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tokenizer_file):
    """run("prepare", "a.jsonl", out="b.jsonl") in tmp_path -> what was printed; run.write(name, dialogs) writes a file."""
    monkeypatch.chdir(tmp_path)

    def run(command, *files, **flags):
        words = [command, *files, "--tokenizer", str(tokenizer_file)]
        for name, value in flags.items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        data.main()
        return capsys.readouterr().out

    def write(name, dialogs):
        (tmp_path / name).write_text("".join(json.dumps({"messages": d}) + "\n" for d in dialogs))
        return name

    run.write = write
    return run


def refused(run, capsys, *words, **flags) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*words, **flags)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1
    return err


# ---------------------------------------------------------------------------------------------------------------------
# Faults

FINE = [
    PROSE,
    "Yes.",
    "Use `<br>` to break a line:\n```html\n<p>One<br>two</p>\n```\nThat is all.",
    "if a < b and b > c then a & b",
    "フェリーは九時に出て、暗くなる前に帰ります。港の灯りは一つずつ人の手でともされ、船長は古い時計を直しながら夜明けを待つ。",
    "- tea\n- milk\n- sugar",
    "Naïve café: Ångström, über, œuvre, â, Ã.",
]


@pytest.mark.parametrize("reply", FINE)
def test_sound_replies_have_no_fault(reply):
    assert fault(dialog("Hi", reply), "clean") is None and fault(dialog("Hi", reply), "quality") is None


@pytest.mark.parametrize(
    ("stage", "reason", "reply"),
    [
        ("clean", "no reply", " "),
        ("clean", "broken encoding", "caf\ufffd"),
        ("clean", "broken encoding", "cafÃ©"),
        ("clean", "broken encoding", "itâ€™s"),
        ("clean", "control characters", "a\x08b"),
        ("clean", "markup remains", "One<br/>two"),
        ("clean", "markup remains", "salt&nbsp;and pepper"),
        ("clean", "truncated", "Here:\n```python\nprint(1)"),
        ("clean", "truncated", PROSE + " And then the captain, who had been waiting for his"),
        ("quality", "refusal", "As an AI language model, I have no opinion."),
        ("quality", "refusal", "I can’t assist with that."),
        ("quality", "repetition", "It is good. " * 30),
        ("quality", "symbols", "a | b | --- +++ " + "".join(f"{i} ||| *** " for i in range(40))),
        ("quality", "readability", " ".join(f"pneumonoultramicroscopic{i}" for i in range(40))),
    ],
)
def test_each_fault_is_found(stage, reason, reply):
    assert fault(dialog("Hi", reply), stage) == reason


def test_an_empty_turn_in_the_middle_is_a_fault():
    assert fault(dialog("", "Yes.") + dialog("a", "b"), "clean") == "empty turn"


def test_few_real_replies_have_a_fault():
    """no_robots is written by people and checked: what these counts remove of it is a measure of their false alarms."""
    path = SHARED / "no_robots_test.jsonl"
    if not path.is_file():
        pytest.skip("no_robots_test.jsonl is not beside the repository")
    found = [fault(d, stage) for d in read_dialogs(path) for stage in ("clean", "quality")]
    assert sum(reason is not None for reason in found) <= 0.02 * 500


# ---------------------------------------------------------------------------------------------------------------------
# Near duplicates


def test_near_duplicates_are_found_as_the_threshold_says():
    """200 texts of 200 words, each once more with some words replaced. 2 % replaced is a similarity near 0.96, 10 % near 0.82."""
    rng, found = np.random.default_rng(0), {}
    for edited in (0.02, 0.10):
        for threshold in (0.95, 0.7):
            near = NearDuplicates(threshold)
            texts = [prose(rng, 200) for _ in range(200)]
            assert [near.find(" ".join(text)) for text in texts] == [None] * 200
            for text in texts:
                for place in rng.choice(200, int(edited * 200), replace=False):
                    text[place] = f"new{rng.integers(10**9)}"
            found[edited, threshold] = np.mean([near.find(" ".join(text), add=False) == i for i, text in enumerate(texts)])
    assert found[0.02, 0.95] > 0.98 and found[0.02, 0.7] > 0.98 and found[0.10, 0.7] > 0.98
    assert found[0.10, 0.95] == 0


def test_similarity_is_counted_with_each_occurrence_of_a_word():
    near = NearDuplicates(0.9)
    near.find("tea " * 20)
    assert near.find("tea " * 17, add=False) is None and near.find("tea " * 19, add=False) == 0
    near.find("tea " * 10 + "milk " * 10)
    assert near.find("milk " * 19 + "tea", add=False) is None
    assert near.find("", add=False) is None
    all_alike = NearDuplicates(1.0)
    assert [all_alike.find(text) for text in ("a", "a b", "b a")] == [None, None, 1]


def test_texts_without_a_word_are_duplicates_only_of_their_like(run):
    """Sums and emojis: of a thousand records whose replies are signs, one was left."""
    near = NearDuplicates(0.95)
    assert [near.find(text) for text in ("+", "=", " + ", "🙂", "🎉 ", "🎉", "")] == [None, None, 0, None, None, 3, None]
    assert not ngrams(dialog("🙂", "+")) & ngrams(dialog("🎉", "="))
    run.write("a.jsonl", [dialog(f"Which sign is number {i}?", sign) for i, sign in enumerate("+-×÷=+")])
    assert "5 left" in run("prepare", "a.jsonl", out="b.jsonl", stages="dedup", dedup_on="reply")


def test_the_most_diverse_are_unlike_each_other():
    rng, near = np.random.default_rng(0), NearDuplicates(0.95)
    kinds = [prose(rng, 100) for _ in range(5)]
    texts = [" ".join([*kind, f"x{i}"]) for i in range(10) for kind in kinds]
    chosen = most_diverse(np.array([near.minima(near.words(text)) for text in texts]), 5)
    assert sorted(i % 5 for i in chosen) == [0, 1, 2, 3, 4]


def test_thirteen_words_in_a_row_make_a_gram_and_a_short_text_is_one():
    words = [f"w{i}" for i in range(15)]
    assert ngrams(dialog(" ".join(words[:8]), " ".join(words[8:]))) == {tuple(words[i : i + 13]) for i in range(3)}
    assert ngrams(dialog("Hi there", "Yo")) == {("hi", "there", "yo")}


# ---------------------------------------------------------------------------------------------------------------------
# prepare


def mixed(rng: random.Random, n: int) -> list[list[dict]]:
    """Dialogs good and bad: some repeated, some nearly, some broken."""
    dialogs = []
    for i in range(n):
        words = [
            rng.choice("ferry lamp quay clock mend nine dark hand boat rope".split()) + str(rng.randrange(50)) for _ in range(60)
        ]
        dialogs.append(dialog(f"Question {i}?", " ".join(words) + "."))
        if i % 5 == 0:
            dialogs.append(dialogs[-1])
        if i % 7 == 0:
            dialogs.append(dialog(f"Question {i}?", " ".join([*words[:-1], "other"]) + "."))
        if i % 11 == 0:
            dialogs.append(dialog("Hi", rng.choice(["", "caf\ufffd", "x" * 3000 + ".", "As an AI, I cannot."])))
    return dialogs


def test_every_record_is_written_or_counted_and_the_same_seed_writes_the_same(run, tmp_path):
    run.write("a.jsonl", mixed(random.Random(0), 150))
    run.write("exam.jsonl", [json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["messages"]])
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "Hi", "response": "Yes."}\n{"prompt": 3}\nnonsense\n\xff\n', encoding="latin-1"
    )
    flags = {"model_max_length": 2000, "split": 0.1, "select": 100, "against": "exam.jsonl"}
    printed = run("prepare", "a.jsonl", "bad.jsonl", out="b.jsonl", **flags)
    for reason in (
        "malformed",
        "broken encoding",
        "no reply",
        "longer than the 2000 tokens of --model_max_length",
        "exact duplicate",
        "near-duplicate",
        "shares 13 words",
    ):
        assert re.search(rf"-\d+ +{reason}\n +\S", printed), reason  # each with an example
    read = int(re.match(r"(\d+) records read", printed)[1])
    removed = sum(int(n) for n in re.findall(r"^  \w+ +-(\d+)", printed, re.M))
    one, held = (list(read_records(tmp_path / name)) for name in ("b.jsonl", "b.validation.jsonl"))
    assert read == len((tmp_path / "a.jsonl").read_text().splitlines()) + 4 == len(one) + len(held) + removed
    assert (len(one), len(held)) == (90, 10)
    assert "bad.jsonl, line 3: not JSON" in printed and "bad.jsonl, line 2: no known fields" in printed

    assert run("prepare", "a.jsonl", "bad.jsonl", out="c.jsonl", **flags) == printed.replace("b.jsonl", "c.jsonl").replace(
        "b.validation", "c.validation"
    )
    for kind in (".jsonl", ".validation.jsonl"):
        assert (tmp_path / f"b{kind}").read_bytes() == (tmp_path / f"c{kind}").read_bytes()
    run("prepare", "a.jsonl", "bad.jsonl", out="d.jsonl", **flags, seed=1)
    assert (tmp_path / "b.jsonl").read_bytes() != (tmp_path / "d.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_stage_that_is_off_removes_nothing_and_stages_can_be_run_one_by_one(run, tmp_path):
    run.write("a.jsonl", mixed(random.Random(1), 60))
    count = len((tmp_path / "a.jsonl").read_text().splitlines())
    assert f"{count} left" in run("prepare", "a.jsonl", out="none.jsonl", stages="mix")
    run("prepare", "a.jsonl", out="all.jsonl", stages=["clean", "length", "quality", "dedup"], model_max_length=2000)
    name = "a.jsonl"
    for stage in ("clean", "length", "quality", "dedup"):
        run("prepare", name, out=f"{stage}.jsonl", stages=stage, model_max_length=2000)
        name = f"{stage}.jsonl"
    assert (tmp_path / "dedup.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()  # with where each record came from
    assert {r.origin.split(",")[0] for r in read_records(tmp_path / name)} == {"a.jsonl"}


def test_no_validation_record_has_a_near_duplicate_in_training(run, tmp_path):
    """The control: without the split's own search, pairs that dedup was told to leave would be torn apart."""
    run.write("a.jsonl", mixed(random.Random(2), 200))
    printed = run("prepare", "a.jsonl", out="b.jsonl", stages=["split", "mix"], split=0.3)
    assert "near-duplicate of a validation record" in printed
    near = NearDuplicates(0.95)
    for d in read_dialogs(tmp_path / "b.validation.jsonl"):
        near.find(text_of(d))
    assert all(near.find(text_of(d), add=False) is None for d in read_dialogs(tmp_path / "b.jsonl"))


def test_weights_mix_and_kinds_survive(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "Add.", "input": "1 and 2", "output": "Three."}\n')
    (tmp_path / "b.txt").write_text("Once upon a time.\n")
    run("prepare", "a.jsonl:3", "b.txt", out="c.jsonl")
    records = list(read_records(tmp_path / "c.jsonl"))
    assert sorted(record.kind for record in records) == ["alpaca"] * 3 + ["text"]
    assert {m["input"] for record in records for m in record.dialog if "input" in m} == {"1 and 2"}
    run.write("d.jsonl", [dialog(f"Question {i}?", "Yes.") for i in range(40)])
    printed = run("prepare", "d.jsonl:0.5", out="e.jsonl", stages="mix")
    left = len(list(read_records(tmp_path / "e.jsonl")))
    assert 10 < left < 30 and re.search(rf"mix +-{40 - left} +left out by the weight of its file", printed)
    assert not (tmp_path / "e.validation.jsonl").exists()


def test_select_keeps_the_longest_replies(run, tmp_path):
    run.write("a.jsonl", [dialog("Hi", "a" * n + ".") for n in (3, 9, 1, 7, 5)])
    run("prepare", "a.jsonl", out="b.jsonl", select=2, stages="select")
    assert [len(d[1]["content"]) for d in read_dialogs(tmp_path / "b.jsonl")] == [10, 8]
    run("prepare", "a.jsonl", out="c.jsonl", select=2, select_by="diverse", stages="select")
    assert len(list(read_dialogs(tmp_path / "c.jsonl"))) == 2


@pytest.fixture
def killed(run, tmp_path, monkeypatch, tokenizer_file):
    """killed(at, ...) runs prepare in a process of its own that kills itself with SIGKILL at its event number `at`: a record
    parsed (unless parsing=False), before a file is renamed and after. Returns how many events there were; None if killed."""

    def killed(at, *files, parsing=True, **flags):
        reading, writing = os.pipe()
        if pid := os.fork():
            os.close(writing)
            events = os.fdopen(reading).read()
            assert os.waitpid(pid, 0)[1] in (0, signal.SIGKILL)
            return int(events) if events else None
        events = 0

        def event():
            nonlocal events
            events += 1
            if events == at:
                os.kill(os.getpid(), signal.SIGKILL)

        loads, replace = json.loads, os.replace
        monkeypatch.setattr(json, "loads", lambda text: (parsing and event(), loads(text))[1])
        monkeypatch.setattr(os, "replace", lambda old, new: (event(), replace(old, new), event()))
        try:
            run("prepare", *files, **flags)
            os.write(writing, str(events).encode())
        finally:
            os._exit(0)

    return killed


EVERY_STAGE = {"model_max_length": 2000, "split": 0.2, "select": 30, "against": "exam.jsonl"}


@pytest.mark.parametrize("select_by", ["longest", "diverse"])
def test_a_prepare_that_is_killed_again_and_again_writes_the_same_bytes(run, killed, tmp_path, select_by):
    """kill -9 inside every stage and between them, anywhere from 1 event to a third of all after each start."""
    flags, rng = EVERY_STAGE | {"select_by": select_by}, random.Random(select_by)
    run.write("a.jsonl", mixed(rng, 50))
    run.write("b.jsonl", mixed(rng, 10))
    run.write("exam.jsonl", [json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["messages"]])
    inputs = ("a.jsonl:1.5", "b.jsonl")
    run("prepare", *inputs, out="whole.jsonl", **flags)
    names = sorted(path.name for path in tmp_path.iterdir())
    total = killed(0, *inputs, out="whole.jsonl", overwrite=True, **flags)
    for _ in range(3):
        inside, after = 0, set()
        while not (tmp_path / "c.jsonl").exists():
            events = killed(rng.randrange(1, total // 3), *inputs, out="c.jsonl", **flags)
            inside += bool(list(tmp_path.glob("c.jsonl.work/*/unfinished")))
            after |= {path.stem for path in tmp_path.glob("c.jsonl.work/*/*.jsonl")}
        assert (events or 0) < total and inside > 2 and len(after) > 2
        for end in (".jsonl", ".validation.jsonl"):
            assert (tmp_path / f"c{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
            (tmp_path / f"c{end}").unlink()
        shutil.rmtree(tmp_path / "c.jsonl.work", ignore_errors=True)  # killed when all was done but the tidying
        assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_killed_before_or_after_any_rename_it_goes_on_after_the_last_whole_stage(run, killed, tmp_path):
    run.write("a.jsonl", mixed(random.Random(3), 12))
    run.write("exam.jsonl", [dialog("Hi", "Yes.")])
    flags = EVERY_STAGE | {"select": 9}
    report = run("prepare", "a.jsonl", out="whole.jsonl", **flags)
    stages = ["read", "clean", "length", "quality", "against", "dedup", "select", "split", "mix", "mix", "mix"]
    for at in range(1, 2 * len(stages) + 1):  # a rename a stage and two of the output, before and after each
        assert killed(at, "a.jsonl", out="c.jsonl", parsing=False, **flags) is None
        (tmp_path / "c.jsonl").unlink(missing_ok=True)  # whole already, after the last of all
        whole = stages[at // 2 - 1] if at > 1 else None
        said = f"going on after the stage {whole} of a run that was stopped\n" if whole else ""
        assert run("prepare", "a.jsonl", out="c.jsonl", **flags).replace("c.", "whole.") == said + report
        for end in (".jsonl", ".validation.jsonl"):
            assert (tmp_path / f"c{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
            (tmp_path / f"c{end}").unlink()
        assert not (tmp_path / "c.jsonl.work").exists()


def test_killed_while_it_tidies_up_it_leaves_nothing_half_removed_to_go_on_from(run, killed, tmp_path, monkeypatch):
    run.write("a.jsonl", mixed(random.Random(6), 12))
    report = run("prepare", "a.jsonl", out="c.jsonl", split=0.2)
    whole = [(tmp_path / f"c{end}").read_bytes() for end in (".jsonl", ".validation.jsonl")]

    def first_file_only(folder, **_):
        next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", first_file_only)
        assert killed(0, "a.jsonl", out="c.jsonl", split=0.2, overwrite=True) is None
    assert (tmp_path / "c.jsonl.work").exists()
    assert run("prepare", "a.jsonl", out="c.jsonl", split=0.2, overwrite=True) == report
    assert [(tmp_path / f"c{end}").read_bytes() for end in (".jsonl", ".validation.jsonl")] == whole


def test_a_second_prepare_of_the_same_file_is_refused_while_the_first_is_at_work(run, capsys, tmp_path):
    """Both would write the same stages in the same folder: each took the other's file from under it, and both died."""
    run.write("a.jsonl", [dialog("Hi", "Yes.")])
    with alone(tmp_path / "b.jsonl.work", DataError()):
        for seed in (1, 2):  # it may not clear away what was begun with other flags either
            said = refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", seed=seed)
            assert "another prepare is at work on b.jsonl, in b.jsonl.work: name another file with --out" in said
    assert "1 left" in run("prepare", "a.jsonl", out="b.jsonl")


def test_a_prepare_that_fills_the_disk_says_so_and_goes_on_when_there_is_room(run, capsys, tmp_path):
    run.write("a.jsonl", mixed(random.Random(7), 30))
    run("prepare", "a.jsonl:3", out="whole.jsonl")

    def small():
        limit = (tmp_path / "whole.jsonl").stat().st_size - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        said = refused(run, capsys, "prepare", "a.jsonl:3", out="c.jsonl")
        assert "c.jsonl.work: File too large; the stages that are finished stay there, and the same command goes on" in said

    if not (pid := os.fork()):
        try:
            small()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert "going on after the stage dedup" in run("prepare", "a.jsonl:3", out="c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_inputs_or_flags_do_not_go_on_with_what_was_begun(run, killed, tmp_path):
    run.write("a.jsonl", mixed(random.Random(4), 12))
    for change in ("input", "flag"):
        assert killed(7, "a.jsonl", out="c.jsonl", parsing=False) is None
        if change == "input":
            run.write("a.jsonl", mixed(random.Random(5), 12))
        printed = run("prepare", "a.jsonl", out="c.jsonl", seed=7 if change == "flag" else 42)
        assert "going on" not in printed
        assert printed == run("prepare", "a.jsonl", out="c.jsonl", seed=7 if change == "flag" else 42, overwrite=True)
        (tmp_path / "c.jsonl").unlink()
    assert not (tmp_path / "c.jsonl.work").exists()


def test_mistakes_get_one_sentence_and_leave_no_output(run, capsys, tmp_path):
    run.write("a.jsonl", [dialog("Hi", "Yes.")])
    assert "needs --out FILE.jsonl" in refused(run, capsys, "prepare", "a.jsonl")
    assert "in a folder that exists" in refused(run, capsys, "prepare", "a.jsonl", out="no/b.jsonl")
    assert "unknown stage wash: known are clean" in refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", stages="wash")
    assert "--plot a.xyz: name a .png" in refused(run, capsys, "stats", "a.jsonl", plot="a.xyz")
    assert "--near must be from 0.3 to 1, not 2.0" in refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", near=2)
    assert "--seed must be from 0 to 2147483648, not -1" in refused(run, capsys, "stats", "a.jsonl", seed=-1)
    assert "--select must be from 0 to 2147483648, not -1" in refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", select=-1)
    assert "leaves none to train on" in refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", split=0.02)
    assert "a.jsonl exists already" in refused(run, capsys, "prepare", "a.jsonl", out="a.jsonl")
    assert "say show, stats or prepare" in refused(run, capsys, "shew", "a.jsonl")
    assert "no_robots is not here: download" in refused(run, capsys, "stats", "no_robots")
    (tmp_path / "bad.jsonl").write_text("nonsense")
    assert "bad.jsonl, line 1: not JSON" in refused(run, capsys, "prepare", "bad.jsonl", out="b.jsonl", stages="mix")
    assert not list(tmp_path.glob("b.*"))


# ---------------------------------------------------------------------------------------------------------------------
# show and stats


def test_show_marks_what_is_supervised_with_its_ids_and_where_it_is_cut(run, tokenizer):
    run.write("a.jsonl", [dialog("Where?", "In Oakford."), dialog("b", "c")])
    printed = run("show", "a.jsonl", n=1, model_max_length=12)
    shown = re.findall(r"(\*?)([^\s:]+):(\d+)(?= )", printed.split("supervised (*)\n")[1])
    ids, labels = data.encode_dialog(dialog("Where?", "In Oakford."), tokenizer, data.TEMPLATES["llama2"])
    assert [int(i) for _, _, i in shown] == ids
    assert [star == "*" for star, _, _ in shown] == [label != data.IGNORE for label in labels]
    before, after = printed.split("\n--- cut here, at 12 tokens (--model_max_length)\n")
    assert before.count(":1") and len(re.findall(r":\d+ ", before.split("supervised (*)\n")[1])) == 12
    assert printed.startswith("template llama2: by the records' fields")
    assert after.rstrip().endswith("--- end of document") and "line 2" not in printed


def test_stats_counts_what_is_there(run, tokenizer, tmp_path):
    dialogs = [dialog("Where?", "In Oakford."), dialog("Where?", "In Oakford."), dialog("Who?", "Mira " * 300)]
    run.write("a.jsonl", dialogs)
    lengths = [len(data.encode_dialog(d, tokenizer, data.TEMPLATES["llama2"])[0]) for d in dialogs]
    printed = run("stats", "a.jsonl", model_max_length=64)
    assert "3 records, 1 of them exact duplicates; 6 turns" in printed
    assert f"{sum(lengths):,} tokens" in printed and "1 records are longer than 64" in printed
    assert f"{lengths[2] - 64:,} tokens lost" in printed
    pytest.importorskip("matplotlib")
    run("stats", "a.jsonl", plot="a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_stats_counts_the_records_that_train_leaves_out(run, tokenizer):
    dialogs = [dialog("Where?", said) for said in ("In Oakford.", " ", "Mira " * 90)] + [dialog("Who? " * 90, "Mira.")]
    run.write("a.jsonl", dialogs)
    fates = data.encode_documents(dialogs, tokenizer, data.TEMPLATES["llama2"], max_length=64)[1]
    left_out = sum(count for fate, count in fates.items() if fate.startswith("dropped"))
    assert left_out == 2
    assert "2 have no reply, or one that begins after 64 tokens" in run("stats", "a.jsonl", model_max_length=64)


def test_stats_has_no_negative_share_and_a_bar_for_the_shortest_records(run):
    """White space around a message is not written, and so is not among its tokens either."""
    run.write("a.jsonl", [dialog("\n" * 50 + "Where?", "In Oakford." + " " * 50)])
    printed = run("stats", "a.jsonl")
    assert "template" in printed and "-" not in printed.split("supervised:")[1].splitlines()[0]
    run.write("a.jsonl", [dialog("a", "a")])
    assert re.search(r"\n +0 to +15 +1 #{60}\n", run("stats", "a.jsonl", template="plain"))


def test_a_person_runs_it_from_anywhere(tmp_path):
    """As a program data.py is the module that preparing/ imports: were it a second copy, its errors would end in a traceback."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "response": 3}')
    words = [sys.executable, str(REPOSITORY / "data.py"), "prepare", "a.jsonl", "--out", "b.jsonl", "--stages", "mix"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    tokenizer, mistake = result.stderr.splitlines()
    assert "--tokenizer" in tokenizer  # whose tokens are counted is said, where it is not asked for
    assert mistake == "data.py: a.jsonl, line 1: field 'response' should hold text and holds int; fields here: prompt, response"


def test_what_was_prepared_trains(run, tmp_path):
    """From two schemas to a mixed, split set, and a step on it."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"instruction": "Say {i}.", "output": "It is {i}."}}\n' for i in range(40)))
    (tmp_path / "b.csv").write_text("prompt,response\n" + "".join(f"Who is {i}?,Mira {i}.\n" for i in range(40)))
    run("prepare", "a.jsonl:2", "b.csv", out="c.jsonl", split=0.1, stages=["clean", "split", "mix"])
    words = [sys.executable, str(REPOSITORY / "train.py"), "--data", "c.jsonl", "--eval_data", "c.validation.jsonl"]
    words += "--max_steps 1 --output_dir run --device cpu --samples 0".split()
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "template llama2: the records are of several kinds (alpaca, llama2)" in result.stdout


def test_an_unknown_name_is_refused_before_any_data_is_read(run, capsys, tmp_path, tokenizer_file):
    """The proof: the file to be read first is broken in its first line, and that is not what is complained of."""
    (tmp_path / "bad.jsonl").write_text("nonsense")
    for command in ("show", "stats", "prepare"):
        assert "unknown template 'chatml'" in refused(run, capsys, command, "bad.jsonl", template="chatml", out="b.jsonl")
        assert "dolphin is not here: download" in refused(run, capsys, command, "bad.jsonl", "dolphin", out="b.jsonl")
    assert "alpaca is not here" in refused(run, capsys, "prepare", "bad.jsonl", against="alpaca", stages="mix", out="b.jsonl")
    for flags, sentence in (
        ({"template": "chatml"}, "unknown template 'chatml'"),
        ({"data": ("bad.jsonl", "no_robots")}, "no_robots is not here: download"),
        ({"eval_data": ("no_robots",)}, "no_robots is not here: download"),
        ({"eval_data": ("absent.jsonl",)}, "absent.jsonl cannot be read: No such file"),
        ({}, "bad.jsonl, line 1: not JSON"),
    ):
        with pytest.raises(DataError, match=sentence):
            read_data(TrainConfig(**{"data": ("bad.jsonl",), "tokenizer": str(tokenizer_file)} | flags), print)


def test_a_weight_that_leaves_no_record_is_told_as_the_reason(run, tmp_path, tokenizer_file):
    run.write("a.jsonl", [dialog("Hi", "Yes.")])
    with pytest.raises(DataError, match="nothing to learn from: their weights leave no record"):
        read_data(TrainConfig(data=("a.jsonl:0.001",), tokenizer=str(tokenizer_file)), print)


def test_data_errors_of_reading_name_the_file_of_against(run, capsys, tmp_path):
    run.write("a.jsonl", [dialog("Hi", "Yes.")])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path / "absent.jsonl"))
    assert "absent.jsonl cannot be read" in refused(run, capsys, "prepare", "a.jsonl", out="b.jsonl", against="absent.jsonl")
