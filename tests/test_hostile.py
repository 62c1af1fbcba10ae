"""Files, names and texts from strangers: nothing of theirs is run, followed or obeyed."""

import ast
import importlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
from nanomdm import bins, checkpoint, cli
from nanomdm.errors import visible

SOURCES = sorted(
    path
    for folder in (".", "nanomdm", "bench", "tools", "tests", "tests/stress")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "setup.py"
)


class Payload:
    """Makes a file when it is unpickled without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# --- The source ---------------------------------------------------------------------------------
# What runs a stranger's code: these built-ins, and these functions of modules.

BUILT_IN = {"eval", "exec", "compile", "__import__"}
FUNCTIONS = {
    *("pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load"),
    *("os.system", "os.popen", "hydra.utils.instantiate", "hydra.utils.call", "torch.jit.load"),
    *("OmegaConf.register_new_resolver", "runpy.run_path", "torch.package.PackageImporter"),
}
ALLOWED = {  # tests that show that a payload is live, or that run what they or a user wrote
    ("test_checkpoint.py", "torch.load"),
    ("test_hostile.py", "torch.load"),
    ("test_cli.py", "shell=True"),
    *(("test_export.py", what) for what in ("trust_remote_code=True", "exec", "compile")),
    *(("test_extending.py", what) for what in ("exec", "compile")),  # of what the docs show
}


def dangers(path: Path) -> set[str]:
    """The calls in a file that could run what somebody else has written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in BUILT_IN | FUNCTIONS:
            found.add(name)
        if name == "torch.load" and options.get("weights_only") != "True":
            found.add(name)
        if options.get("shell", "False") != "False":
            found.add("shell=True")
        if options.get("allow_pickle", "False") != "False":
            found.add("allow_pickle=True")
        trusting = options.get("trust_remote_code", "False")
        if trusting not in ("False", "config.trust_remote_code"):
            found.add("trust_remote_code=True")
        told = "trust_remote_code" in options or None in options  # as a keyword, or within **
        automatic = re.search(r"\bAuto\w+\.from_pretrained$", name)
        if automatic and not told and not path.name.startswith("test_"):
            found.add(f"{name} without trust_remote_code=False")
    return {what for what in found if (path.name, what) not in ALLOWED}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_calls_what_could_run_a_strangers_code(path):
    assert dangers(path) == set()


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "pickle.loads(x)", "torch.load(x)", "torch.load(x, weights_only=False)"),
        *("yaml.load(x)", "AutoModel.from_pretrained(x)", "run(x, shell=True)"),
        "f(x, trust_remote_code=True)",
    ],
)
def test_such_calls_are_found(line, tmp_path):
    (tmp_path / "a.py").write_text(line)
    assert dangers(tmp_path / "a.py")


def test_checkpoints_are_read_by_nothing_but_checkpoint_py():
    """The weights of others, on import, are read by PyTorch; the fuzzer makes what it damages."""
    readers = {path.name for path in SOURCES if "torch.load(" in path.read_text()}
    readers = {name for name in readers if not name.startswith("test_")}
    assert readers <= {"checkpoint.py", "fuzz.py", "weight_files.py"}


# --- Pickles ------------------------------------------------------------------------------------

LOADING = {
    "sample": ["sample.py", "checkpoint=evil.pt"],
    "eval": ["eval.py", "checkpoint=evil.pt"],
    "eval against": ["eval.py", "eval.against=evil.pt"],
    "init_from": ["train.py", "training.init_from=evil.pt", "data.dataset=plays"],
    "resume": ["train.py", "training.resume=true", "out_dir=stranger"],
    "judge": ["bench.judge", "judge=evil.pt"],
    "cloze": ["bench.cloze", "checkpoint=evil.pt", "path=items.jsonl"],
    "frontier": ["bench.frontier", "checkpoint=evil.pt", "judge=evil.pt"],
    "sampling": ["bench.sampling", "checkpoint=evil.pt"],
}


def evil(path: Path, trained: Path, marker: Path) -> None:
    """A sound checkpoint but for one more value, which makes `marker` when it is unpickled."""
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint.load(trained / "ckpt.pt") | {"x": Payload(marker)}, path)


@pytest.mark.parametrize("command", LOADING)
def test_a_payload_is_executed_by_no_command(command, run, trained, tmp_path):
    for name in ("evil.pt", "stranger/ckpt.pt"):
        evil(tmp_path / name, trained, tmp_path / "executed")
    (tmp_path / "items.jsonl").write_text('{"text": "KING 1"}\n')
    if command == "eval against":
        LOADING[command].append(f"checkpoint={trained}/ckpt.pt")
    code, _, err = run(*LOADING[command])
    assert code == 2 and "more than plain data" in err and err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_this_payload_is_live(trained, tmp_path):
    evil(tmp_path / "evil.pt", trained, tmp_path / "executed")
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_a_payload_in_nanogpts_meta_file_is_not_executed(tmp_path):
    for split in data.SPLITS:
        (tmp_path / f"{split}.bin").write_bytes(b"\0\0" * 9)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Payload(tmp_path / "executed")}))
    with pytest.raises(ValueError, match="it wants to load"):
        data.open_bins(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_pickle_that_counts_to_a_billion_takes_no_memory():
    start = time.perf_counter()
    with pytest.raises(pickle.UnpicklingError, match="counts more values"):
        bins.read_plain_pickle(b"\x80\x04}r" + struct.pack("<I", 2**30) + b".")
    assert time.perf_counter() - start < 1


# --- Settings -----------------------------------------------------------------------------------


def test_the_environment_does_not_get_into_what_a_checkpoint_asks_of_it(
    run, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("SECRET", "hunter2")
    state = checkpoint.load(trained / "ckpt.pt")
    state["config"]["logging"]["name"] = "${oc.env:SECRET}"
    (tmp_path / "out").mkdir()
    checkpoint.save(tmp_path / "out/ckpt.pt", state)
    code, out, err = run("train.py", "training.resume=true", "training.max_iters=13")
    stored = checkpoint.load(tmp_path / "out/ckpt.pt")["config"]
    assert code == 0 and stored["logging"]["name"] == "${oc.env:SECRET}"
    assert not any(b"hunter2" in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert "hunter2" not in out + err


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """experiment(text): make `text` the experiment `stranger`, beside configs/config.yaml."""
    (tmp_path / "configs/experiment").mkdir(parents=True)
    settings = (cli.CONFIGS / "config.yaml").read_text()
    (tmp_path / "configs/config.yaml").write_text(settings)
    monkeypatch.setattr(cli, "CONFIGS", tmp_path / "configs")
    return lambda text: (tmp_path / "configs/experiment/stranger.yaml").write_text(text)


CALLBACK = """# @package _global_
hydra: {callbacks: {x: {_target_: os.mkdir, path: P}}}
"""


def test_an_experiment_cannot_have_hydra_call_something(run, experiment, tmp_path):
    experiment(CALLBACK.replace("P", f"{tmp_path}/executed"))
    code, _, err = run("train.py", "+experiment=stranger")
    assert code == 2 and "no setting hydra.callbacks" in err
    assert not (tmp_path / "executed").exists()


def test_composing_alone_calls_nothing_either(experiment, tmp_path, monkeypatch):
    """Hydra instantiates callbacks around a program of its own; here it only composes values."""
    experiment(CALLBACK.replace("P", f"{tmp_path}/executed"))
    monkeypatch.setattr(cli, "experiment", lambda value: set())  # as if it were not checked
    assert cli.compose([], "stranger").model.n_layer == 4
    assert not (tmp_path / "executed").exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(("a: [" * 9000, ""), ("model: {n_layer: 2", ""), ("- 1\n- 2\n", ""), (BOMB, "")),
        ("model: {n_layer: 2}\nmodel: {n_layer: 3}\n", ""),
        ("model: !!python/object/apply:os.system [true]\n", ""),
        *(("\xff\xfe", "no setting ÿþ"), ("just a text", "no setting just a text")),
        ("model: {1: 2}\n", "no setting model.1"),
    ],
    ids=["deep", "cut", "list", "bomb", "twice", "python", "encoding", "text", "number"],
)
def test_a_damaged_experiment_is_refused_in_one_line(text, why, run, experiment):
    experiment(text)
    start = time.perf_counter()
    code, _, err = run("train.py", "+experiment=stranger")
    assert code == 2 and err.count("\n") == 1 and (why or "stranger.yaml is damaged") in err
    assert time.perf_counter() - start < 5


# --- Other people's models ----------------------------------------------------------------------


def test_the_code_of_a_hugging_face_folder_is_not_run(run, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    code, _, err = run("bench.judge", f"judge={tmp_path}/model")
    assert code == 2 and "neither a checkpoint" in err and not (tmp_path / "executed").exists()


# --- Terminals ----------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202edesrever\r\x00"


def test_control_characters_become_visible():
    shown = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202edesrever\x0d\x00"
    assert visible(ESCAPES).replace(r"\r", r"\x0d") == shown


def test_text_stays_as_it_is():
    text = "ROMEO:\n\tÜnï 😀 \u200d 日本語\u3000\xa0"
    assert visible(text) == text


def test_an_error_that_quotes_a_file_sends_the_terminal_nothing(run, tmp_path):
    meta = {"dtype": "uint16", "tokenizer": {"kind": ESCAPES}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    code, _, err = run("train.py", f"data.dir={tmp_path}")
    assert code == 2 and "owned" in err and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", err)


def test_an_error_that_quotes_a_whole_file_is_cut(run, tmp_path):
    meta = {"dtype": "uint16", "tokenizer": {"kind": "x" * 10**6}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert len(run("train.py", f"data.dir={tmp_path}").err) < 1100


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sample_with_control_characters_reaches_files_but_no_terminal(
    terminal, run, trained, tmp_path, monkeypatch
):
    state = checkpoint.load(trained / "ckpt.pt")
    letters = state["tokenizer"]["characters"]
    state["tokenizer"]["characters"] = letters.replace("K", "\x1b")
    checkpoint.save(tmp_path / "ckpt.pt", state)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    words = ("checkpoint=ckpt.pt", "prompt=\x1bING", "sampling.steps=2", "system.device=cpu")
    out = run("sample.py", *words).out
    assert ("\x1bING" in out, r"\x1bING" in out) == (not terminal, terminal)


def test_a_letter_that_the_terminal_lacks_is_written_out(run, trained, tmp_path, monkeypatch):
    state = checkpoint.load(trained / "ckpt.pt")
    letters = state["tokenizer"]["characters"]
    state["tokenizer"]["characters"] = letters.replace("K", "é")
    checkpoint.save(tmp_path / "ckpt.pt", state)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer := io.BytesIO(), encoding="ascii"))
    words = ("checkpoint=ckpt.pt", "prompt=éING", "sampling.steps=2", "system.device=cpu")
    assert run("sample.py", *words).code == 0
    assert rb"\xe9ING" in buffer.getvalue()


@pytest.mark.parametrize("key", ["corpus", "sha256"])
def test_names_in_a_meta_file_hold_no_control_characters(key, tmp_path):
    meta = {"dtype": "uint16", "tokenizer": {"kind": "byte"}, key: ESCAPES}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="control characters"):
        data.open_bins(tmp_path)


# --- Supply -------------------------------------------------------------------------------------

UNWANTED = (
    *("wandb", "matplotlib", "transformers", "tokenizers", "tiktoken", "lm_eval", "datasets"),
    *("pandas", "scipy", "hypothesis", "pytest", "torch._dynamo", "torch._inductor", "sympy"),
    *("torch.distributed.fsdp", "torch.distributed.tensor"),
)


def test_the_scripts_import_nothing_that_they_do_not_need():
    script = "import sys, train, sample, eval; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
    assert [name for name in UNWANTED if name in output.split()] == []


def closure(names: list[str]) -> dict[str, str]:
    """The installed distributions that these requirements need, by name, with their versions."""
    metadata = importlib.import_module("importlib.metadata")
    requirements = pytest.importorskip("packaging.requirements")
    found, todo = {}, [requirements.Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = wanted.name.lower().replace("_", "-").replace(".", "-")
        try:
            distribution = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue
        key = (name, *sorted(wanted.extras))
        if key in found:
            continue
        found[key] = distribution.version.split("+")[0]
        for line in distribution.requires or []:
            needed = requirements.Requirement(line)
            extras = [{"extra": extra} for extra in (*wanted.extras, "")]
            if needed.marker is None or any(map(needed.marker.evaluate, extras)):
                todo.append(needed)
    return {key[0]: version for key, version in found.items()}


def declared() -> list[str]:
    """What pyproject.toml asks for, every extra included."""
    project = importlib.import_module("tomllib").loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    asked = [*project["project"]["dependencies"], *(name for extra in extras for name in extra)]
    return [name for name in asked if not name.startswith("nanomdm")]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}


def test_every_package_that_is_installed_for_the_project_is_pinned():
    installed = closure(declared())
    bundled = re.compile(r"nvidia-.*|cuda-.*|triton")  # torch itself says their exact versions
    assert len(installed) > 20
    assert [name for name in installed if name not in pins() and not bundled.match(name)] == []


def test_every_package_that_is_installed_has_the_pinned_version():
    installed, pinned = closure(declared()), pins()
    if installed["torch"] != pinned["torch"]:
        pytest.skip("this environment was not made from constraints.txt")
    assert {n: v for n, v in installed.items() if pinned.get(n, v) != v} == {}


def test_nothing_is_pinned_that_nothing_needs():
    installed = closure(declared())
    if missing := {name_of(line) for line in declared()} - set(installed):
        pytest.skip(f"the extras are not all installed here: {', '.join(missing)}")
    assert sorted(set(pins()) - set(installed)) == []
