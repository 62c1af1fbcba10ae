"""`import nanomdm`: the example of docs/library.md, the wheel, a checkout, and its checkpoints."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, TINY, load_model

import diffusion
import model
import nanomdm
from nanomdm.tokenizers import train_tokenizer

EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)[1]
SIZES = {"L, steps = 128, 1000": "L, steps = 16, 20", "(16,)": "(4,)", "draws=4": "draws=2"}


def build(folder: Path, kind: str) -> Path:
    """A folder with what the wheel, or the editable wheel, puts into site-packages."""
    backend = pytest.importorskip("hatchling.build")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = folder / getattr(backend, f"build_{kind}")(str(folder))
    zipfile.ZipFile(wheel).extractall(folder / kind)
    return folder / kind


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what is in the wheel, and nothing else of the repository."""
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


def output_of(code: str, folder: Path, *path: Path | str) -> str:
    """What a fresh Python prints that runs `code` in a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- The wheel ----------------------------------------------------------------------------------


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
    # An environment that `make` set up has the checkout on its path; nothing may need it.
    code = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n" + code
    code += f"print({str(ROOT)!r} in sys.path)\n"
    code += "print(nanomdm.__file__, set(nanomdm.__all__) <= set(dir(nanomdm)))\n"
    printed = output_of(code, tmp_path, installed)
    *_, equal, found, package = printed.splitlines()
    assert (equal, found) == ("True", "False")
    assert package == f"{installed}/nanomdm/__init__.py True"
    assert re.match(r"at most \d+\.\d{3} ± 0\.\d{3} nats per character\nROMEO:", printed)
    assert load_model(tmp_path / "model.pt").model.config.block_size == 16


def test_the_example_fits_into_30_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 30


# --- A checkout ---------------------------------------------------------------------------------

SAME = "print(model.Transformer is nanomdm.Transformer, diffusion.sample is nanomdm.sample)"


def test_a_script_and_the_library_have_one_class_of_each_name():
    assert model.Transformer is nanomdm.Transformer and nanomdm.model is model
    assert diffusion.sample is nanomdm.sample and nanomdm.diffusion is diffusion


def test_a_checkout_goes_before_a_copy_that_was_installed_whatever_is_imported_first(installed):
    code = f"import model, diffusion, nanomdm, nanomdm.model\n{SAME}\nprint(nanomdm.__file__)"
    assert output_of(code, ROOT, installed) == f"True True\n{ROOT}/nanomdm/__init__.py\n"


def test_there_is_one_class_even_if_the_root_is_not_on_the_path(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "nanomdm").symlink_to(ROOT / "nanomdm")
    code = f"import nanomdm, model, diffusion\n{SAME}"
    assert output_of(code, tmp_path, tmp_path / "site") == "True True\n"


def test_an_editable_install_is_the_checkout_and_leaves_your_own_model_py_alone(tmp_path):
    site = build(tmp_path, "editable")
    (link,) = site.glob("*.pth")  # Python adds the folder that it names behind site-packages
    (tmp_path / "model.py").write_text("mine = True\n")
    code = "import nanomdm, model; print(nanomdm.__file__, nanomdm.model.__file__, model.mine)"
    printed = output_of(code, tmp_path, site, link.read_text().strip())
    assert printed == f"{ROOT}/nanomdm/__init__.py {ROOT}/model.py True\n"


# --- Checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> nanomdm.Transformer:
    """The network of model.pt, which the library saved."""
    tokenizer = train_tokenizer("char", TEXT, split=0, vocab_size=0)
    config = nanomdm.ModelConfig(tokenizer.vocab_size, 32, n_layer=2, n_head=2, n_embd=32)
    network = nanomdm.Transformer(config)
    nanomdm.save(tmp_path / "model.pt", network, tokenizer)
    return network.eval()


CPU = ("system.device=cpu", "system.dtype=float32")


def test_what_the_library_saves_is_sampled_by_sample_py(saved, run):
    result = run("sample.py", "checkpoint=model.pt", "prompt=KING", "sampling.steps=2", *CPU)
    assert result.code == 0 and result.out.startswith("KING")
    assert "model.pt: weights of an unknown run" in result.err


def test_what_the_library_saves_is_scored_by_eval_py_on_a_text_that_is_named(saved, run, text_file):
    words = ("checkpoint=model.pt", "eval.draws=1", *CPU)
    assert run("eval.py", *words, f"data.path={text_file}").code == 0
    result = run("eval.py", *words)
    assert result.code == 2 and "model.pt was trained on is not known: name one by" in result.err


def test_training_starts_from_what_the_library_saves(saved, run, text_file):
    words = (f"data.path={text_file}", "training.init_from=model.pt", "training.max_iters=1")
    still = ("training.learning_rate=1e-9", "training.weight_decay=0")
    sizes = [word for word in TINY if not word.startswith(("model.", "training.max_iters"))]
    assert run("train.py", *sizes, *words, *still).code == 0
    network = load_model("out/ckpt.pt").model
    for ours, theirs in zip(network.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_checkpoint_of_train_py_has_the_same_logits_in_the_library(trained):
    network, tokenizer = nanomdm.load(trained / "ckpt.pt")
    loaded = load_model(trained / "ckpt.pt")
    ids = torch.from_numpy(tokenizer.encode("KING 1:"))[None]
    assert torch.equal(network(ids), loaded.model(ids)) and not network.training


def test_the_library_can_say_more_of_what_it_saves(saved, tmp_path):
    _, tokenizer = nanomdm.load(tmp_path / "model.pt")
    nanomdm.save(tmp_path / "later.pt", saved, tokenizer, step=7)
    assert load_model(tmp_path / "later.pt").weights == "EMA weights after 7 steps"


def test_the_library_refuses_a_file_that_is_none_in_one_line(tmp_path):
    (tmp_path / "model.pt").write_text("To be, or not to be")
    with pytest.raises(ValueError, match=r"model\.pt is damaged or no checkpoint"):
        nanomdm.load(tmp_path / "model.pt")
