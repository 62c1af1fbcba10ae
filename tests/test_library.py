"""The wheel works by itself, and the example of docs/library.md runs on it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import runtime

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)[1]
SIZES = {"L, steps = 128, 1000": "L, steps = 16, 20", "(16,)": "(4,)", "draws=4": "draws=2"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what is in the wheel, and nothing else of the repository."""
    hatchling = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = folder / hatchling.build_wheel(str(folder))
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_files_of_the_repository(installed):
    for name in ("model.py", "diffusion.py", "corpora/plays.txt"):
        assert (installed / "nanomdm" / name).read_bytes() == (ROOT / name).read_bytes()
    assert [path.name for path in installed.iterdir() if path.suffix != ".dist-info"] == ["nanomdm"]


def test_the_example_builds_trains_and_samples_far_from_the_repository(installed, tmp_path):
    """Its network is read back by the scripts, and by `nanomdm.load`."""
    code = EXAMPLE
    for old, new in SIZES.items():
        assert old in code
        code = code.replace(old, new)
    code += (
        "again, _ = nanomdm.load('model.pt')\nprint(torch.equal(again(canvas), model(canvas)))\n"
    )
    code += f"import sys; print({str(ROOT)!r} in sys.path)\n"
    code += "print(nanomdm.__file__, set(nanomdm.__all__) <= set(dir(nanomdm)))\n"
    paths = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-c", code]
    result = subprocess.run(
        python, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    *_, equal, found, package = result.stdout.splitlines()
    assert (equal, found) == ("True", "False")
    assert package == f"{installed}/nanomdm/__init__.py True"
    assert re.match(r"at most \d+\.\d{3} ± 0\.\d{3} nats per character\nROMEO:", result.stdout)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert runtime.ModelConfig(**state["model_config"]).block_size == 16


def test_the_example_fits_into_30_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 30
