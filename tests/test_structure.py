"""The shape of the repository: which file may import which, and that no setting is dead."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import diffusion
from model import ModelConfig

FLOORS = (
    ("model", "diffusion", "bounds", "text", "tokenizer", "data", "optim", "checkpoint"),
    ("cli", "folders", "parallel", "runtime", "runlog", "report"),
    ("train", "sample", "eval"),
)
OWN_SETTINGS = sorted(p for f in ("bench", "tools") for p in (ROOT / "configs" / f).glob("*.yaml"))
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """The top-level modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names.add(node.module.split(".")[0])
    return names


def test_every_python_file_at_the_root_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FLOOR_OF)


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_only_point_down(name):
    siblings = imports_of(ROOT / f"{name}.py") & (set(FLOOR_OF) | {"tools", "bench", "tests"})
    assert all(FLOOR_OF.get(other, 9) < FLOOR_OF[name] for other in siblings), siblings


@pytest.mark.parametrize("name", FLOORS[0])
def test_a_leaf_needs_torch_numpy_and_the_standard_library_only(name):
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy"}
    assert imports_of(ROOT / f"{name}.py") <= allowed


def test_no_root_file_shadows_a_dependency():
    pins = (ROOT / "constraints.txt").read_text()
    packages = {line.split("==")[0].lower().replace("-", "_") for line in pins.splitlines()}
    assert not packages & set(FLOOR_OF)
    assert not set(sys.stdlib_module_names) & set(FLOOR_OF)


def test_the_core_stays_small(capsys):
    sizes = {
        floor: {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in names}
        for floor, names in enumerate(FLOORS)
    }
    with capsys.disabled():
        for floor, files in sizes.items():
            listing = ", ".join(f"{name} {lines}" for name, lines in files.items())
            print(f"\nfloor {floor}: {sum(files.values())} lines ({listing})", end="")
    assert max(max(files.values()) for files in sizes.values()) <= 530
    assert sum(sum(files.values()) for files in sizes.values()) <= 5_000


def test_the_package_holds_exactly_the_leaves():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = wheel["targets"]["wheel"]["force-include"]
    assert {Path(name).stem for name in included if name.endswith(".py")} == set(FLOORS[0])
    assert all(target == f"nanomdm/{source}" for source, target in included.items())


def test_the_package_can_be_used_from_anywhere(tmp_path):
    command = "import nanomdm.model, nanomdm.diffusion, nanomdm.text as t; print(t.PLAYS.exists())"
    python = [sys.executable, "-c", command]
    result = subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if "No module named 'nanomdm'" in result.stderr:
        pytest.skip("not installed here: pip install .")
    assert result.stdout == "True\n", result.stderr


def dotted(values: dict, prefix: str = "") -> set[str]:
    nested = (
        dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        for key, value in values.items()
    )
    return set().union(*nested)


def settings(path: Path = ROOT / "configs" / "config.yaml") -> set[str]:
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return dotted({key: value for key, value in values.items() if key not in ("hydra", "defaults")})


@pytest.mark.parametrize("key", sorted(settings()))
def test_every_setting_is_read(key):
    """By name in the scripts, or as an argument of what the whole section is handed to."""
    section, _, name = key.rpartition(".")
    handed_over = {
        "model": {field.name for field in dataclasses.fields(ModelConfig)},
        "diffusion": set(inspect.signature(diffusion.masked_diffusion_loss).parameters),
        "sampling": {field.name for field in dataclasses.fields(diffusion.Sampling)},
    }
    code = "".join((ROOT / f"{script}.py").read_text() for floor in FLOORS[1:] for script in floor)
    read_by_name = re.search(
        rf"(config|settings|\b{section or 'config'})\.{name}\b|\"{name}\"", code
    )
    assert read_by_name or name in handed_over.get(section, ()), f"nothing reads {key}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_setting_is_explained_in_its_line(path):
    if path.parent.stem == "experiment":
        assert path.read_text().splitlines()[1].startswith("# ")
        return
    text = path.read_text().split("hydra:")[0]
    lines = [line for line in text.splitlines() if re.match(r"\s*\w+:\s*\S", line)]
    assert len(lines) == len(settings(path))
    assert not [line for line in lines if not re.search(r"  # \S", line)]


@pytest.mark.parametrize("path", OWN_SETTINGS, ids=lambda p: f"{p.parent.stem}/{p.stem}")
def test_every_setting_of_a_tool_is_read_by_it(path):
    code = (ROOT / path.parent.stem / f"{path.stem}.py").read_text()
    handed_over = {f"sampling.{field.name}" for field in dataclasses.fields(diffusion.Sampling)}
    if "runtime.sampling(config.sampling" not in code:
        handed_over = set()
    for key in settings(path) - handed_over:
        assert re.search(rf"config\.{re.escape(key)}\b", code), f"nothing reads {key}"
