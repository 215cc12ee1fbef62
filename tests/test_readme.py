"""README.md: what it says can be checked, so it is. Its commands are run, shortened to one step, on models and files made here
under the names they have there; its figures are computed, or found in RESULTS.md."""

import ast
import csv
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import data
import generate
import memory
import train
from data import TEMPLATES, load_template
from generate import GenerateConfig
from helping.flags import parse_flags
from model import PRESETS, Llama, load_model, save_hf
from preparing.commands import STAGES, DataConfig
from preparing.readers import DATASETS
from train import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
RESULTS = (REPOSITORY / "benchmarks" / "RESULTS.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
COMMANDS = [line for language, block in BLOCKS if language in ("bash", "") for line in block.splitlines()]
INSTALL = "pip install -r requirements.txt && "
CONFIGS = {"train.py": TrainConfig, "generate.py": GenerateConfig, "data.py": DataConfig}

# How each command is run: the first pattern that it matches says. TOGETHER and PAGE are in the long part.
RULES = {
    rf"^{INSTALL}": "CI",  # .ci/run has these two as they are
    r"^torchrun --nn?\w* ": "TOGETHER",  # two processes here, whatever number it names, or two nodes of one
    r"^python generate\.py .*--web": "PAGE",
    r"^(torchrun|python) (train|generate|data|memory)\.py": "HERE",
    r"^python -m pytest exercises/": "RED",  # what a reader is to turn green
    r"^(vllm serve|curl|python llama\.cpp/|llama\.cpp/)": "ELSEWHERE",  # other projects' programs: README says what was tried
}
RULE = {command: next((how for rule, how in RULES.items() if re.search(rule, command)), None) for command in COMMANDS}

# What makes a command short: given last, it is what counts.
SHORT = {
    "train.py": "--max_steps 1 --gradient_accumulation_steps 1 --samples 0 --exact_match False --save_steps 0 --device cpu",
    "generate.py": "--max_new_tokens 4 --device cpu",
    "data.py": "",
    "memory.py": "",
}


def run_as(how: str):
    return pytest.mark.parametrize("command", [command for command in COMMANDS if RULE[command] == how])


def shortened(command: str, output_dir="out") -> list[str]:
    """The words of a command from its script on, made short."""
    words = shlex.split(command.removeprefix(INSTALL))
    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if words[0] == "train.py":
        words += ["--output_dir", output_dir, "--overwrite"]
    if "--plot" in words and find_spec("matplotlib") is None:
        del words[(i := words.index("--plot")) : i + 2]
    return words + SHORT[words[0]].split()


def run_here(words: list[str], patch) -> None:
    """The program, in this process: one that imports PyTorch again takes seconds."""
    script = {"train.py": train, "generate.py": generate, "data.py": data, "memory.py": memory}[words[0]]
    patch.setattr(sys, "argv", words)
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who keeps a squirrel?\n/quit\n")))
    try:
        script.main()
    except SystemExit as ended:
        assert not ended.code, ended.code


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with all that README's commands name: models called as real ones are, records, and the first command's run."""
    folder, tiny = tmp_path_factory.mktemp("workshop"), REPOSITORY / "tiny"
    shutil.copytree(tiny, folder / "llama-2-7b", ignore=shutil.ignore_patterns("*.py*", "*.jsonl", "__pycache__"))
    sizes = json.loads((tiny / "params.json").read_text()) | {"max_seq_len": 4096}
    (folder / "llama-2-7b" / "params.json").write_text(json.dumps(sizes))
    save_hf(load_model(folder / "llama-2-7b"), folder / "llama-2-7b-hf")
    records = [json.loads(line)["messages"] for line in (tiny / "instructions.jsonl").read_text().splitlines()[:90]]
    pairs = [(question["content"], answer["content"]) for question, answer in records]

    def write(name, some):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in some))

    write("mine.jsonl", ({"prompt": prompt, "response": reply} for prompt, reply in pairs[:40]))
    write("guanaco.jsonl", ({"text": f"### Human: {prompt}### Assistant: {reply}"} for prompt, reply in pairs[:40]))
    write("exam.jsonl", ({"prompt": prompt, "response": reply} for prompt, reply in pairs[40:45]))
    write("questions.jsonl", ({"prompt": prompt} for prompt, _ in pairs[:3]))
    for name, some in (("mine.csv", pairs[:40]), ("more.csv", pairs[40:])):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([("prompt", "response"), *some])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(shortened(COMMANDS[0], "runs/lora"), patch)
    return folder


def check_settings(words: list[str], folder: Path) -> None:
    """The run in the folder was one of just these flags, and is finished."""
    settings = json.loads((folder / "run.json").read_text())["settings"]
    for name, value in parse_flags(TrainConfig, "", words[1:]).items():
        if name not in ("overwrite", "model", "data", "output_dir"):  # paths have become absolute
            assert settings[name] == value, name
    assert (folder / ("model.safetensors" if settings["method"] == "full" else "adapter_model.safetensors")).is_file()


def test_every_command_has_a_rule_by_which_it_is_run():
    assert len(COMMANDS) > 25
    assert not [command for command, how in RULE.items() if how is None]
    assert set(RULES.values()) == set(RULE.values()), "a rule for nothing"
    tried = README.split("Tried so far")[1].split("\n\n")[0]
    assert all(re.search(rf"{name} b?[\d.]*\d", tried) for name in ("transformers", "vLLM", r"llama\.cpp")), "by no version"


def test_the_first_two_commands_are_those_that_ci_runs():
    assert COMMANDS[:2] == [f"{INSTALL}torchrun train.py --method lora", f"{INSTALL}python -m pytest"]
    assert [command for command, how in RULE.items() if how == "CI"] == COMMANDS[:2]
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert all(part in ci for command in COMMANDS[:2] for part in command.replace("-r req", "-q -r req").split(" && "))


def test_the_first_command_runs(workshop):
    check_settings(shortened(COMMANDS[0], "runs/lora"), workshop / "runs" / "lora")


@run_as("HERE")
def test_a_command_runs(command, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    words = shortened(command)
    run_here(words, monkeypatch)
    assert sum(map(len, capsys.readouterr())) > 10
    for flag, file in pairwise(words):
        assert flag not in ("--out", "--merge", "--save", "--plot") or Path(file).exists()
    if words[0] == "train.py":
        check_settings(words, workshop / "out")


@run_as("RED")
def test_an_exercise_is_found_and_red(command):
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed" in done.stdout


@pytest.mark.live
@pytest.mark.skipif(find_spec("transformers") is None, reason="minutes: for CI's long part, which has requirements-extra.txt")
@run_as("TOGETHER")
def test_a_command_for_several_gpus_runs_in_two_processes(command, workshop):
    """A process for a GPU, on the cores of this machine; two nodes are two addresses of it, with a process each."""
    words = shlex.split(command)
    launcher, words = words[1 : words.index("train.py")], shortened(command, "together")
    launcher[launcher.index("--nproc_per_node") + 1] = "2"
    nodes = [["--standalone", *launcher]]
    if "--nnodes" in launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launcher[launcher.index("HOST:29500")] = f"127.0.0.1:{free.getsockname()[1]}"
        launcher[launcher.index("--nproc_per_node") + 1] = "1"
        nodes = [[*launcher, f"--local_addr=127.0.0.{i}"] for i in (1, 2)]
    script = [str(REPOSITORY / words[0]), *words[1:]]
    running = [
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *node, *script], cwd=workshop, stderr=subprocess.PIPE)
        for node in nodes
    ]
    for process in running:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said.decode()
    check_settings(words, workshop / "together")
    assert json.loads((workshop / "together" / "run.json").read_text())["processes"] == 2


@pytest.mark.live
@run_as("PAGE")
def test_the_page_is_served(command, workshop, monkeypatch, capsys):
    """Up to the browser: that a page answers who asks it is in test_talking.py."""
    gradio = pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **how: launched.append(how))
    monkeypatch.setattr("talking.web.threading.Event.wait", lambda self, timeout=None: None)
    monkeypatch.chdir(workshop)
    run_here(shortened(command), monkeypatch)
    assert launched[0]["server_name"] == "127.0.0.1" and "http://127.0.0.1:7860" in capsys.readouterr().out


@pytest.mark.live
def test_the_python_blocks_run(workshop, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(workshop)
    shutil.rmtree("merged", ignore_errors=True)
    run_here(shortened("python generate.py --adapter runs/lora --merge merged"), monkeypatch)
    names, ids = {}, torch.arange(3, 40)[None]
    logits = []
    for block in (block for language, block in BLOCKS if language == "python"):
        exec(block, names)
        logits.append(names["model"](ids).logits)
    assert len(logits) == 2
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)  # base and adapter are as one what they are as two


def test_a_template_of_ones_own_is_read_as_it_stands_there():
    (written,) = re.findall(r"`(\{\"user\": .*?\})`", README)
    assert load_template(written)[0].stop == ("Q:",)


def test_every_flag_that_is_named_exists(monkeypatch, capsys):
    flags = {"help"}
    for script in SHORT:
        run_here([script, "--help"], monkeypatch)
        flags |= {*re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)}
    theirs = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}
    theirs |= {"max-model-len", "outfile", "outtype", "temp"}
    assert {*re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)} - flags == theirs


def test_five_packages_are_enough():
    lines = (REPOSITORY / "requirements.txt").read_text().split()
    assert [re.split("[=>]", line)[0] for line in lines] == ["torch", "sentencepiece", "safetensors", "numpy", "pytest"]
    assert lines[0] == "torch==2.13.0"


# ---------------------------------------------------------------------------------------------------------------------
# Help


@pytest.mark.parametrize("script", ["train.py", "generate.py", "data.py", "memory.py"])
def test_help_is_a_page_that_teaches(script, monkeypatch, capsys):
    """The script's essay, then every flag in groups: with words of its own, its kind and its default."""
    monkeypatch.setenv("COLUMNS", "130")
    run_here([script, "--help"], monkeypatch)
    page, config = capsys.readouterr().out, CONFIGS.get(script, TrainConfig)
    essay = sys.modules[script.removesuffix(".py")].__doc__
    assert essay.strip() in page and str(REPOSITORY) not in page and "None" not in page.replace(essay, "")
    flags = re.split(r"\n  (?=--)", page)[1:]
    assert {flag.split()[0].strip("-") for flag in flags} >= config.__dataclass_fields__.keys()
    for flag in flags:
        assert len(re.findall(r"[a-z]{2,}", re.sub(r"^--\w+( \{.*?\}| \[.*?\]| TEXT| N| X)*", "", flag))) >= 2, flag


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures_of_7b() -> dict[str, str]:
    """What is said of 7B, with {} where its number stands, and the number as it must be written there."""
    sizes = PRESETS["7b"]
    with torch.device("meta"):
        model = Llama(sizes)
    total, block = (sum(weight.numel() for weight in part.parameters()) for part in (model, model.layers[0]))
    linears, tables = sizes.n_layers * block, 2 * sizes.vocab_size * sizes.dim
    bits, cached = 4 + 8 / 64 + 32 / (64 * 256), 2 * sizes.n_layers * sizes.n_kv_heads * (sizes.dim // sizes.n_heads) * 2
    return {
        "= {} million weights each": f"{block / 1e6:.0f}",
        "head): {} billion weights": f"{total / 1e9:.2f}",
        "{} GB in 16 bits.\n": f"{total * 2 / 1e9:.1f}",
        "{} GB for 7B in 16 bits": f"{total * 2 / 1e9:.1f}",
        "bytes = {} MB a token": f"{cached / 2**20:.1f}",
        "= {} trained numbers": f"{8 * 2 * sizes.dim:,}",
        "instead of {} million": f"{sizes.dim**2 / 1e6:.1f}",
        "in fp32, {} GB for 7B": f"{12 * total / 1e9:.0f}",
        "(64 x 256) = {} bits": f"{bits:.3f}",
        "7B's blocks take {} GB": f"{linears * bits / 8 / 1e9:.1f}",
        "GB instead of {}. The": f"{linears * 2 / 1e9:.1f}",
        "(NF4: {} GB for 7B": f"{(linears * bits / 8 + tables * 2) / 1e9:.1f}",
        "GB for 7B instead of {})": f"{total * 2 / 1e9:.1f}",
    }


@pytest.mark.parametrize(("words", "figure"), figures_of_7b().items())
def test_what_is_said_of_7b_is_so(words, figure):
    places = (file for file in REPOSITORY.glob("*/*.py") if file.parent.name not in ("tests", "benchmarks", "exercises"))
    said = "\n".join(file.read_text() for file in (REPOSITORY / "README.md", *REPOSITORY.glob("*.py"), *places))
    assert {*re.findall(re.escape(words).replace(r"\{\}", r"([\d.,]*\d)"), said)} == {figure}


def test_the_table_of_answers_is_that_of_the_results():
    rows = [re.findall(r"([\d.]+) %", row) for row in re.findall(r"\n\| (?:LoRA, rank 8|QLoRA|full).*% of 200.*", RESULTS)]
    answered = re.findall(r"\n\| \d+ questions .*?\|(.*)", README)
    held_out, never_told = ([float(cell) for cell in re.findall(r"([\d.]+) %", row)] for row in answered)
    assert held_out == [float(rows[0][0]), *(float(row[1]) for row in rows)]
    assert never_told[1:] == [float(row[2]) for row in rows]


def test_the_memory_picture_shows_the_peaks_of_the_table():
    peaks = [json.loads(line)["peak"] for line in (REPOSITORY / "pictures" / "memory.jsonl").read_text().splitlines()]
    assert len(peaks) == 5 and all(f"| {peak / 1e9:.2f} |" in README for peak in peaks)


def claims() -> list[list[str]]:
    table = README.split("## Claims and evidence")[1].split("\n## ")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", table, re.M)[2:]]


@pytest.mark.parametrize("row", claims(), ids=lambda row: row[0])
def test_the_figures_of_a_claim_stand_in_its_evidence(row):
    """A number is one of RESULTS.md, with the same date, or a bound that a test of this claim asserts."""
    claim, evidence, figure, when = row
    files = [REPOSITORY / name for name in re.findall(r"`((?:tests|benchmarks)/\w+\.py|\.ci/run)", evidence)]
    assert claim and figure and files and all(file.is_file() for file in files)
    assert when == "each run of the tests" or when.split(",")[0] in RESULTS
    known = RESULTS if when[0] == "2" else "".join(file.read_text() for file in files)
    for number in re.findall(r"\d[\d.e-]*\d|\d", figure):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", known), f"{number} stands nowhere"


def test_the_line_counts_are_right():
    rows = re.findall(r"\| \[`([\w/]+\.py)`\]\(\1\) \| (\d+) \|", README)
    assert len(rows) >= 5
    for name, lines in rows:
        assert int(lines) == len((REPOSITORY / name).read_text().splitlines()), f"{name} has grown or shrunk: correct README.md"


def test_every_file_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:tests|tiny|benchmarks|exercises)/[\w.]+)`", README)
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_every_template_stage_and_dataset_is_named():
    assert all(f"`{name}`" in README for name in (*TEMPLATES, *STAGES))
    assert all(name in README.lower() for name in DATASETS)


def test_who_imports_whom_is_as_the_reading_order_has_it():
    """At the top of a file, where a reader sees it: five leaves, generate.py over three of them, train.py over all it uses.
    (model.py's last lines bring in weights/, which knows quant.py's NF4 in files.)"""
    scripts = "model lora quant data train generate memory".split()

    def imported(script):
        body = ast.parse((REPOSITORY / f"{script}.py").read_text()).body
        found = {node.module for node in body if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        return found & {*scripts}

    leaves = {script: set() for script in ("model", "lora", "quant", "data", "memory")}
    expected = leaves | {"generate": {"data", "lora", "model"}, "train": {"data", "generate", "lora", "model", "quant"}}
    assert {script: imported(script) for script in scripts} == expected
