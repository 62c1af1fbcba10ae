"""The shape of the repository: which file may import which, and that no setting is dead.

Nothing here limits what you add: files of your own at the root, or entries of your own in a file.
The size of the core is `make lint`'s business (tests/budgets.py).
"""

import ast
import dataclasses
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from budgets import SIX, count
from conftest import ROOT, TINY, environment
from omegaconf import OmegaConf

from model import ModelConfig
from nanomdm import cli

ROOMS = sorted(path.stem for path in (ROOT / "nanomdm").glob("[!_]*.py"))
SCRIPTS = {"train", "sample", "eval"}
PURE = ("model.py", "diffusion.py", "nanomdm/strategies.py")  # a Hugging Face export has copies
CODE_OF = {"bench": "bench", "tools": "tools", "stress": "tests/stress"}  # by folder of configs/
OWN_SETTINGS = sorted(p for name in CODE_OF for p in (ROOT / "configs" / name).glob("*.yaml"))


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; those of its own package as ".name"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path} has an import from above its package"
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {f".{module.split('.')[0]}" for module in modules}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


# --- Who may import whom ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_needs_torch_and_the_standard_library_alone(name):
    assert imports_of(ROOT / name) <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_other_rooms_and_nothing_else_of_ours(name):
    found = imports_of(ROOT / "nanomdm" / f"{name}.py")
    assert not found & {"nanomdm", "bench", "tools", "tests", *SIX}
    assert {module for module in found if module[0] == "."} <= {f".{room}" for room in ROOMS}


def test_the_rooms_form_no_circle():
    graph = {f".{name}": imports_of(ROOT / "nanomdm" / f"{name}.py") for name in ROOMS}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError, which names it


@pytest.mark.parametrize("name", SIX)
def test_no_root_file_imports_a_script_or_what_stands_apart(name):
    assert not imports_of(ROOT / f"{name}.py") & {*SCRIPTS, "bench", "tools", "tests"}


def test_no_name_of_ours_shadows_a_dependency_or_the_standard_library():
    pins = (ROOT / "constraints.txt").read_text()
    packages = {line.split("==")[0].lower().replace("-", "_") for line in pins.splitlines()}
    ours = {*SIX, "nanomdm", "bench", "tools"}
    assert not ours & (packages | set(sys.stdlib_module_names))


# --- Alone, from anywhere, and in a few frames --------------------------------------------------

USES = {
    "model": """
config = model.ModelConfig(5, block_size=4, n_layer=1, n_head=1, n_embd=8, conv_width=3)
x0 = torch.tensor([[0, 1, 2, 3]])
network = model.Transformer(config)
assert network(x0).shape == (1, 4, 5)
network(x0.masked_fill(x0 > 1, config.mask_id), x0, x0 > 1).sum().backward()
""",
    "diffusion": """
network = lambda xt: torch.zeros(*xt.shape, 5)
x0 = torch.tensor([[0, 1, 2, 3]])
assert diffusion.masked_diffusion_loss(network, x0, mask_id=5).isfinite()
value, error = diffusion.nelbo(network, x0, mask_id=5)
assert abs(value - torch.tensor(5.0).log()) < 1e-5
everywhere = x0 >= 0
assert diffusion.sample(network, x0, is_masked=everywhere, mask_id=5).ids.max() < 5
""",
}


def python(code: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("name", USES)
def test_a_file_works_alone_in_an_empty_folder(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ours = {*SIX, "nanomdm"} - {name}
    code = f"import sys, torch, {name}\n{USES[name]}\nprint(sys.modules.keys() & {ours})"
    result = python(f"{code}\nprint({name}.__file__)", tmp_path, clean)
    assert result.stdout == f"set()\n{tmp_path}/{name}.py\n", result.stderr


TO_THE_CROSS_ENTROPY = """
import json, os, runpy, sys, traceback
import torch.nn.functional

def stop(*arguments, **settings):
    frames = [frame.filename for frame in traceback.extract_stack()]
    print(json.dumps(frames), flush=True)
    os._exit(0)

torch.nn.functional.cross_entropy = stop
_, sys.argv[0] = sys.argv.pop(0), "train.py"
runpy.run_path(SCRIPT, run_name="__main__")
"""


def test_at_most_seven_frames_in_four_files_lead_to_the_cross_entropy(tmp_path, text_file):
    """Of ours, from `python train.py` on, without torch.compile."""
    script = f"SCRIPT = {str(ROOT / 'train.py')!r}\n{TO_THE_CROSS_ENTROPY}"
    command = [sys.executable, "-c", script, "train.py", *TINY, f"data.path={text_file}"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    files = [Path(name) for name in json.loads(result.stdout.splitlines()[-1])]
    ours = [
        path for path in files if path.is_relative_to(ROOT) and "site-packages" not in path.parts
    ]
    assert ours[0] == ROOT / "train.py" and ours[-1] == ROOT / "model.py"
    assert len(ours) <= 7 and len(set(ours)) <= 4, ours


# --- Settings -----------------------------------------------------------------------------------


def settings(path: Path = ROOT / "configs" / "config.yaml") -> set[str]:
    return set(cli.flat(OmegaConf.to_container(OmegaConf.load(path), resolve=False)))


def test_there_are_at_most_60_settings():
    assert len(settings()) <= 60


@pytest.mark.parametrize("key", sorted(settings()))
def test_every_setting_is_read(key):
    """By name, or as a field of the shape that the model's section is handed over as."""
    section, _, name = key.rpartition(".")
    if section == "model" and name in {field.name for field in dataclasses.fields(ModelConfig)}:
        return
    files = [*(ROOT / f"{name}.py" for name in SIX), *(ROOT / "nanomdm").glob("*.py")]
    code = "".join(path.read_text() for path in files)
    holder = rf"config|settings|section|{section or 'config'}"
    assert re.search(rf"\b({holder})\.{name}\b", code), f"nothing reads {key}"


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").rglob("*.yaml")),
    ids=lambda path: f"{path.parent.stem}/{path.stem}",
)
def test_every_setting_is_explained_in_its_line(path):
    text = path.read_text()
    if path.parent.stem == "experiment":
        assert text.splitlines()[1].startswith("# ")
        return
    lines = [line for line in text.splitlines() if re.match(r"\s*\w+:\s*[^\s#]", line)]
    assert len(lines) == len(settings(path))
    assert not [line for line in lines if not re.search(r"  # \S", line)]


@pytest.mark.parametrize("path", OWN_SETTINGS, ids=lambda p: f"{p.parent.stem}/{p.stem}")
def test_every_setting_of_a_tool_is_read_by_it(path):
    code = (ROOT / CODE_OF[path.parent.stem] / f"{path.stem}.py").read_text()
    handed_over = re.search(r"config\.sampling\b(?!\.)", code)  # as a whole
    for key in settings(path):
        if not (handed_over and key.startswith("sampling.")):
            assert re.search(rf"config\.{re.escape(key)}\b", code), f"nothing reads {key}"


# --- What you add -------------------------------------------------------------------------------

YOURS = {  # by the file that it is written into, or that is new
    "my_script.py": "import train\n\ntrain.cli.main(train.main)\n",
    "my/samples.py": "import sample\nfrom tools import view\n",
    "nanomdm/strategies.py": "def mine(state):\n    return state.is_masked\n\n\n"
    'STRATEGIES["mine"] = mine\n',
    "nanomdm/optim.py": "def mine(parameters, learning_rate, weight_decay):\n"
    "    return [torch.optim.SGD(parameters.values(), learning_rate)]\n\n\n"
    'OPTIMIZERS["mine"] = mine\n',
    "nanomdm/bounds.py": 'BOUNDS["mine"] = Bound(everything, "is mine")\n',
    "train.py": "def my_metric(run):\n    return sum(p.sum() for p in run.ema.parameters())\n"
    + "\n\ndef more():\n    return (\n"
    + "        1,\n" * 2000
    + "    )\n",
}


def test_a_file_or_an_entry_of_your_own_fails_none_of_these_tests(tmp_path):
    copied = shutil.ignore_patterns("__pycache__", ".*", "out*")
    for name in ("nanomdm", "bench", "tools", "configs", "tests", "corpora"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=copied)
    for name in (*(f"{name}.py" for name in SIX), "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "my").mkdir()
    for name, code in YOURS.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n\n{code}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "tests/test_structure.py", "-k", "not alone and not frames and not your_own"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout


def test_the_size_of_a_file_is_that_of_its_code(tmp_path):
    code = (
        '"""A docstring."""\n\n# a comment\nx = f"{1 + 1} and {y:>{z}}"\n\n\n\ny = (\n    1,\n)\n'
    )
    (tmp_path / "code.py").write_text(code)
    assert count(tmp_path / "code.py") == len(["x", "=", "f", "y", "=", "(", "1", ",", ")"])
