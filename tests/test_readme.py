"""README.md is true: its commands run, its files exist, its links lead somewhere."""

import importlib
import json
import operator
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from budgets import SIX
from conftest import ROOT, TEXT, TINY

import data
import model
from nanomdm import cli
from nanomdm.tokenizers import train_tokenizer

README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[str]:
    """The lines of the blocks of shell that begin with python."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.S | re.M)
    return [ln for block in blocks for ln in block.splitlines() if ln.startswith("python ")]


COMMANDS = commands(README)
PAGES = (
    ROOT / "docs" / f"{name}.md" for name in ("evaluation", "seeing", "pairs", "sudoku", "blocks")
)
DOCUMENTED = [command for page in PAGES for command in commands(page.read_text())]
PROMISED = """
python train.py
python train.py +experiment=medium logging.wandb=true
python train.py training.max_iters=10000 model.n_layer=6
python train.py model.n_layer=6 model.n_head=6 model.n_embd=384 training.learning_rate=6e-4 logging.wandb=true
python train.py model.n_layer=8 model.n_head=8 model.n_embd=512 training.max_iters=20000
python train.py logging.wandb=true logging.project=mdm-experiments logging.name=my-run logging.tags=[small,debug]
python train.py system.device=cpu system.dtype=float32
python sample.py checkpoint=out/ckpt.pt
python sample.py checkpoint=out/ckpt.pt prompt="ROMEO:"
python sample.py checkpoint=out/ckpt.pt prompt="To be or not"
python sample.py checkpoint=out/ckpt.pt sampling.steps=128 sampling.temperature=0.8
python sample.py checkpoint=out/ckpt.pt sampling.strategy=confidence
python sample.py checkpoint=out/ckpt.pt num_samples=5
python eval.py checkpoint=out/ckpt.pt
""".strip().splitlines()  # noqa: E501
SHRINK = [word for word in TINY if not word.startswith(("system", "sampling"))]


@pytest.fixture
def folder(tmp_path, trained, monkeypatch):
    """A working directory as a user has it after a first run, on a corpus that is tiny."""
    runs = ("ar", "sudoku", "sudoku9", "pairs", "documents", "blocks")
    for name in ("out", *(f"out-{run}" for run in runs)):
        shutil.copytree(trained, tmp_path / name)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "plays.txt").write_text(TEXT)
    tokenizer = train_tokenizer("char", TEXT, split=0, vocab_size=0)
    splits = {split: tokenizer.encode(TEXT) for split in data.SPLITS}
    data.write_bins(tmp_path / "prepared" / "shakespeare_char", splits, tokenizer, {})
    write_lines(
        tmp_path / "stories.jsonl", [{"text": TEXT[i : i + 60]} for i in range(0, 3000, 60)]
    )
    write_lines(tmp_path / "pairs.jsonl", [{"prompt": "KING", "response": "crown"}] * 20)
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "pairs6.jsonl")
    (tmp_path / "puzzles.txt").write_text("53..7....\n")
    (tmp_path / "grids.txt").write_text("1234\n3412\n" * 20)
    (tmp_path / "prepared" / "games").mkdir()
    for split in data.SPLITS:
        np.arange(400, dtype=np.uint16).tofile(tmp_path / "prepared" / "games" / f"{split}.bin")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def write_lines(path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_commands_that_were_promised_are_shown():
    assert set(PROMISED) <= set(COMMANDS)


@pytest.mark.parametrize(
    "command", sorted({c for c in COMMANDS + DOCUMENTED if " -m " not in c or "train.py" in c})
)
def test_a_command_of_the_readme_works(command, folder, run, text_file):
    """Run as it stands there, but on a small text, with a network and a run that are shrunk."""
    _, script, *words = shlex.split(command)
    if script == "train.py":
        own_data = any(word.startswith("data.") for word in words)
        words += SHRINK + ([] if own_data else [f"data.path={text_file}"])
        if "sudoku" in command and not own_data:
            words = [*words[:-1], "data.dataset=sudoku4", "model.block_size=16"]
        if "data.rows=true" in words:
            words = [word for word in words if "block_size" not in word]
        if "training.resume=true" in words:
            words = ["training.resume=true"]
    else:
        for old, new in (("ROMEO", "KING"), ("To be or not", "The crown"), ("=64", "=24")):
            words = [word.replace(old, new) for word in words]
        words.append("sampling.steps=4")
    if "training.init_from=out-documents/best.pt" in words:
        assert run(script, *TINY, "data.path=stories.jsonl", "out_dir=out-documents").code == 0
    result = run(script, *words)
    assert result.code == 0, result.err
    assert result.out.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS + DOCUMENTED if "python -m" in c])
def test_a_bench_or_tool_takes_the_settings_that_are_shown(command, run, monkeypatch):
    """Up to where it would begin: every key exists, every value is of its type."""
    _, _, module, *words = shlex.split(command)
    received = []
    monkeypatch.setattr(
        importlib.import_module(module), "main", lambda config: received.append(config.explicit)
    )
    assert run(module, *words).code == 0
    first = next(iter(cli.load_defaults(module.replace(".", "/"))))  # plain words are its items
    assert received == [{word.split("=")[0] if "=" in word else first for word in words}]


@pytest.fixture
def configured(monkeypatch):
    """configured("key=value", ...): the configuration that train.py would begin with."""

    def configured(*words: str) -> cli.Section:
        received = []
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        cli.main(received.append)
        return received[0]

    return configured


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "-m" not in c])
def test_a_training_command_means_what_it_says(command, configured):
    """Unshrunk, up to where the run would begin: every value that it names arrives."""
    words = shlex.split(command)[2:]
    config = configured(*words)
    for word in words:
        if not word.startswith("+"):
            key, value = word.split("=")
            arrived = operator.attrgetter(key)(config)
            is_text = isinstance(arrived, str)
            meant = value if is_text else type(arrived)(yaml.safe_load(value))
            assert arrived == meant, key


@pytest.mark.parametrize("name", ["small", "medium", "text8", "openwebtext"])
def test_the_table_of_sizes_is_right(name, configured):
    shape = configured(f"+experiment={name}").model
    shape.attention_gate = True  # as train.py has it
    with torch.device("meta"):
        vocabulary = {"openwebtext": 50257, "text8": 27}.get(name, 65)
        network = model.Transformer(model.ModelConfig(vocabulary, **vars(shape)))
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    sizes = f"{shape.n_layer}, {shape.n_head}, {shape.n_embd}, {shape.block_size}"
    assert f"`python train.py +experiment={name}` | {sizes} | {millions:.1f} M |" in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_leads_somewhere(target):
    assert (ROOT / target).exists()


def test_the_listing_names_the_six_files_in_the_order_to_read_them():
    listing = re.search(r"## The six files\n\n```\n(.*?)```", README, flags=re.S)[1]
    assert [line.split()[0] for line in listing.splitlines()] == [f"{name}.py" for name in SIX]


def test_functions_that_the_concepts_link_to_exist():
    for name, file in re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", README):
        assert f"def {name}(" in (ROOT / file).read_text()


def test_the_make_file_installs_what_pyproject_says_with_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt" in makefile
    assert re.search(r"^torch==2\.13\.0$", (ROOT / "constraints.txt").read_text(), flags=re.M)
