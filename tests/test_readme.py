"""README.md: what it says can be checked, so it is."""

import re
import shlex
from pathlib import Path

import pytest

from data import STAGES, TEMPLATES, DataConfig, parse_flags
from generate import GenerateConfig
from preparing.readers import DATASETS
from train import TrainConfig, complete

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


def test_the_first_two_commands_are_those_that_ci_runs():
    assert COMMANDS[:2] == [
        "pip install -r requirements.txt && torchrun train.py --method lora",
        "pip install -r requirements.txt && python -m pytest",
    ]
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert all(part in ci for command in COMMANDS[:2] for part in command.replace("-r req", "-q -r req").split(" && "))


def test_five_packages_are_enough():
    lines = (REPOSITORY / "requirements.txt").read_text().split()
    assert [re.split("[=>]", line)[0] for line in lines] == ["torch", "sentencepiece", "safetensors", "numpy", "pytest"]
    assert lines[0] == "torch==2.13.0"


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"(train|generate|data)\.py", c)])
def test_every_flag_of_every_command_exists(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(script) + 1 :]
    config = {"train.py": TrainConfig, "generate.py": GenerateConfig, "data.py": DataConfig}[script]
    if config is DataConfig:  # what is done, and the files it is done to, come before the flags
        assert arguments[0] in ("show", "stats", "prepare") and not arguments[1].startswith("-")
        arguments = [word for i, word in enumerate(arguments) if any(w.startswith("--") for w in arguments[: i + 1])]
    given = parse_flags(config, "", arguments)
    assert config is DataConfig or (given and (config is GenerateConfig or complete(given)))


@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, DataConfig])
def test_every_flag_says_in_help_what_it_is_for(config, capsys):
    """The words stand behind the field, on its line: a field broken over several lines loses them."""
    with pytest.raises(SystemExit):
        parse_flags(config, "", ["--help"])
    flags = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(flags) == len(config.__dataclass_fields__)
    for flag in flags:
        assert len(re.findall(r"[a-z]{2,}", re.sub(r"^--\w+( \{.*?\}| \[.*?\]| NAME| N| X)*", "", flag))) >= 2, flag


def test_the_line_counts_are_right():
    rows = re.findall(r"\| \[`([\w/]+\.py)`\]\(\1\) \| (\d+) \|", README)
    assert len(rows) >= 5
    for name, lines in rows:
        assert int(lines) == len((REPOSITORY / name).read_text().splitlines()), f"{name} has grown or shrunk: correct README.md"


def test_every_file_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:tests|tiny|benchmarks)/[\w.]+)`", README)
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_every_template_stage_and_dataset_is_named():
    assert all(f"`{name}`" in README for name in (*TEMPLATES, *STAGES))
    assert all(name in README.lower() for name in DATASETS)
