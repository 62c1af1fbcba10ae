"""A folder for transformers: the same network, the same ids, and a card that claims nothing."""

import json
import logging
import random
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, load_model
from test_readme import commands
from test_tokenizers import gpt2 as gpt2_tokenizer  # noqa: F401

from diffusion import sample
from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli
from nanomdm.strategies import STRATEGIES, Sampler, from_config
from nanomdm.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer
from tools import export, hf_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
POEM = "The owl and the pussycat went to sea in a beautiful pea-green boat.\n" * 20
WARNINGS = []  # of loading what was exported
SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained):
    """(checkpoint, folder, model, tokenizer): a trained model, exported and loaded again."""
    folder = tmp_path_factory.mktemp("hub") / "kings"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        modules = str(tmp_path_factory.mktemp("modules"))
        for module in (transformers.dynamic_module_utils, transformers.utils.hub):
            patch.setattr(module, "HF_MODULES_CACHE", modules, raising=False)
        patch.setattr("sys.path", [modules, *sys.path])
        settings = vars(cli.section(cli.load_defaults("tools/export")))
        settings |= {"checkpoint": f"{trained}/ckpt.pt", "to": str(folder)}
        export.main(cli.section(settings))
        handler = logging.Handler()
        handler.emit = WARNINGS.append
        logging.getLogger("transformers").addHandler(handler)
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        logging.getLogger("transformers").removeHandler(handler)
    return trained / "ckpt.pt", folder, model.eval(), tokenizer


@pytest.fixture(scope="module")
def ours(exported):
    return load_model(exported[0])


def drawn_ids(network: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, network.vocab_size + 1, (3, network.block_size), generator=generator)


def test_what_is_exported_loads_without_a_warning(exported):
    assert [record.getMessage() for record in WARNINGS] == []


# --- The network --------------------------------------------------------------------------------


@torch.no_grad()
def test_the_logits_are_those_of_the_averaged_weights_in_every_bit(exported, ours):
    ids = drawn_ids(ours.model.config)
    assert torch.equal(exported[2](ids).logits, ours.model(ids))
    raw = Transformer(ours.model.config).eval()
    raw.load_state_dict(ours.state["model"])
    assert not torch.equal(exported[2](ids).logits, raw(ids))


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_where_there_are_labels(exported, ours):
    ids, V = drawn_ids(ours.model.config), ours.model.config.vocab_size
    is_masked = ids == V
    labels = torch.where(is_masked, 3, -100)
    loss = exported[2](ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    expected = -ours.model(ids)[is_masked].log_softmax(dim=-1)[:, 3].mean()
    torch.testing.assert_close(loss, expected)


def test_padding_is_refused(exported):
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask has zeros"):
        exported[2](ids, attention_mask=torch.arange(8)[None] < 5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks_are_filled_as_our_own_sampler_fills_them(strategy, exported, ours):
    ids, V = drawn_ids(ours.model.config), ours.model.config.vocab_size
    values = {"strategy": strategy, "steps": 4, "temperature": 0.8}
    options = {"top_k": 9, "top_p": 0.9, "guidance": 1.0, "block_length": 16}
    sampler = from_config(SimpleNamespace(**values, options=options), sample)
    generator = torch.Generator().manual_seed(5)
    expected = sampler.fill(ours.model, ids, ids == V, generator=generator).ids
    assert torch.equal(exported[2].fill(ids, seed=5, **values, **options), expected)
    assert not (expected == V).any() and torch.equal(expected[ids != V], ids[ids != V])


def test_a_network_with_blocks_is_filled_block_by_block(exported):
    torch.manual_seed(0)
    network = Transformer(ModelConfig(9, block_length=4, **SHAPE)).eval()
    with mock.patch.object(exported[2], "transformer", network):
        ids = torch.full((2, 32), 9).masked_fill(torch.arange(32) < 5, 3)
        filled = exported[2].fill(ids, seed=5, strategy="spread", steps=3)
        with pytest.raises(ValueError, match="after the block of a .MASK."):
            exported[2].fill(ids.masked_fill(torch.arange(32) == 1, 9))
    sampler = Sampler(sample, "spread", {"strategy": STRATEGIES["spread"], "steps": 3})
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(filled, sampler.fill(network, ids, ids == 9, generator=generator).ids)
    assert "in blocks of 4: each is predicted" in export.blocks_of(network.config)


def test_masks_are_filled_by_the_defaults_of_diffusion_py_and_a_strategys_own_settings(
    exported, ours
):
    ids, V = drawn_ids(ours.model.config), ours.model.config.vocab_size

    def expected(**settings) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        options = {"is_masked": ids == V, "mask_id": V, "generator": generator}
        return sample(ours.model, ids, **options, **settings).ids

    assert torch.equal(exported[2].fill(ids, seed=5), expected())
    settings = {"strategy": partial(STRATEGIES["remask"], remask_rate=0.5), "steps": 6}
    filled = exported[2].fill(ids, seed=5, strategy="remask", steps=6, remask_rate=0.5)
    assert torch.equal(filled, expected(**settings))
    with pytest.raises(ValueError, match="strategy=best is unknown: choose stochastic"):
        exported[2].fill(ids, strategy="best")


def test_the_code_in_the_folder_is_the_code_of_the_repository(exported):
    for name in ("model.py", "diffusion.py", "nanomdm/strategies.py", "LICENSE"):
        assert (exported[1] / Path(name).name).read_bytes() == (ROOT / name).read_bytes()


def test_the_rope_tables_of_a_rounded_network_are_made_again_rounded(tmp_path):
    code = {}
    source = (ROOT / "tools" / "modeling_nanomdm.py").read_text()
    source = source.replace("from .strategies", "from nanomdm.strategies")
    source = source.replace("from .", "from ")
    exec(compile(source, "modeling_nanomdm.py", "exec"), code)
    network = SHAPE | {"vocab_size": 5, "rope_base": 50.0, "rope_rounded": True}
    wrapper = code["NanoMDMForMaskedLM"](code["NanoMDMConfig"](network=network))
    expected = wrapper.transformer.cos.clone()
    wrapper.transformer.cos.zero_()
    wrapper._init_weights(wrapper.transformer)
    assert torch.equal(wrapper.transformer.cos, expected) and expected.any()


# --- Tokenizers ---------------------------------------------------------------------------------


def any_text(kind: str, rng: random.Random) -> str:
    if kind.startswith("char"):
        return "".join(rng.choices("\nañ€😀 The", k=rng.randrange(30)))
    ranges = [(32, 127), (0, 0xD800), (0x10000, 0x110000), (9, 14)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30)))


@pytest.mark.parametrize(
    "kind", ["char", "char with ends", "byte", "byte with ends", "bpe", "gpt2"]
)
def test_any_text_has_our_ids_and_comes_back(kind, request, tmp_path):
    ours = {
        "char": lambda: CharTokenizer("\nañ€😀 The"),
        "char with ends": lambda: CharTokenizer("\nañ€😀 The", ends=True),
        "byte": ByteTokenizer,
        "byte with ends": lambda: ByteTokenizer(ends=True),
        "bpe": lambda: BPETokenizer.train(POEM, len(POEM), 280),
        "gpt2": lambda: request.getfixturevalue("gpt2_tokenizer"),
    }[kind]()
    converted = hf_tokenizer.convert(ours, ours.vocab_size)
    converted.save(str(tmp_path / "tokenizer.json"))
    about = hf_tokenizer.settings(converted, ours, 32)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    theirs, rng = transformers.AutoTokenizer.from_pretrained(tmp_path), random.Random(7)
    for _ in range(200):
        text = any_text(kind, rng)
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    given = ours.encode("The").tolist()
    V = theirs.mask_token_id
    assert V == ours.vocab_size
    assert theirs("The[MASK][MASK]The")["input_ids"] == [*given, V, V, *given]
    assert theirs.eos_token_id == ours.eos


def test_a_character_that_is_unknown_is_refused_as_by_ours(exported):
    with pytest.raises(Exception, match="Missing"):
        exported[3]("€")


# --- The card -----------------------------------------------------------------------------------


def words(trained, folder, *more: str) -> list[str]:
    return [f"checkpoint={trained}/best.pt", f"to={folder}", *more]


def test_the_card_has_the_bound_with_its_error_where_it_was_measured(run, trained, tmp_path):
    of_best = f"checkpoint={trained}/best.pt"
    assert run("eval.py", of_best, "eval.draws=2", "output=f.json").code == 0
    assert (
        run("tools.export", *words(trained, "kings", "figures=f.json", "licence=cc0-1.0")).code == 0
    )
    card, loss = (
        (tmp_path / "kings/README.md").read_text(),
        json.loads((tmp_path / "f.json").read_text())["loss"],
    )
    assert f"{loss['value']:.4f} ± {loss['standard_error']:.4f} nats per token" in card
    assert "license: cc0-1.0\n" in card and "weights: cc0-1.0; code: MIT" in card
    refused = run("tools.export", f"checkpoint={trained}/ckpt.pt", "to=other", "figures=f.json")
    assert refused.code == 2 and "are of" in refused.err


def test_the_card_says_how_to_measure_what_is_not_known(exported):
    path, folder, *_ = exported
    card, best = (folder / "README.md").read_text(), checkpoint.load(path)["best"]
    assert f"{best:.4f} nats per token is the lowest of its run" in card
    assert "`python eval.py checkpoint=ckpt.pt output=figures.json` measures it" in card
    assert "±" not in card and not re.search(r"\{[A-Z]+\}", card)


def test_the_card_has_corpus_and_command_but_no_path_of_this_machine(exported):
    card = (exported[1] / "README.md").read_text()
    assert "| corpus | kings.txt (sha256 `" in card
    assert "`python train.py model.n_layer=2" in card and " data.path=kings.txt " in card
    assert "cache_dir" not in card and "logging" not in card
    assert "/" not in re.search(r"eval.py (checkpoint=\S+)", card)[1]


def test_the_example_of_the_card_runs(exported, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (exported[1] / "README.md").read_text(), re.S)[1]
    _, _, model, tokenizer = exported
    monkeypatch.setattr(
        transformers.AutoModelForMaskedLM, "from_pretrained", lambda *_, **__: model
    )
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: tokenizer
    )
    exec(code, {})
    assert re.fullmatch(r"[^\[]{32}\n", capsys.readouterr().out, re.S)  # the context is 32


def test_the_example_of_the_page_runs(exported, monkeypatch, capsys):
    page = (ROOT / "docs" / "interchange.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1].replace("the king", "The crown")
    _, _, model, tokenizer = exported
    for name, what in (("AutoModelForMaskedLM", model), ("PreTrainedTokenizerFast", tokenizer)):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *_, w=what, **__: w
        )
    exec(code, {})
    assert re.fullmatch(r"The crown...\n", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("command", commands((ROOT / "docs" / "interchange.md").read_text()))
def test_a_command_of_the_page_takes_the_settings_that_are_shown(command, monkeypatch):
    """Up to where it would begin: every key exists, every value is of its type."""
    module, *words = shlex.split(command.replace("python -m", "python").replace(".py", ""))[1:]
    received = []
    config = module.replace(".", "/") if module.startswith("tools") else "config"
    monkeypatch.setattr("sys.argv", [module, *words])
    cli.main(lambda config: received.append(config.explicit), config)
    assert received == [{word.split("=")[0] for word in words}]


# --- What is refused, and the hub ---------------------------------------------------------------


def test_a_command_of_an_earlier_version_has_the_settings_that_there_still_are():
    config = {
        "data": {"cache_dir": "/home/me/cache", "path": "/home/me/kings.txt"},
        "model": {"n_layer": 2, "qk_norm": True},
        "diffusion": {"eps": 0.01},
        "training": {"keep": 3, "eval_tokens": 500},
    }
    expected = "python train.py model.n_layer=2 data.path=kings.txt diffusion.eps=0.01"
    assert export.command(config) == expected


def test_a_folder_that_is_not_empty_is_left_alone(run, trained, tmp_path):
    (tmp_path / "kings").mkdir()
    (tmp_path / "kings" / "mine").write_text("dear")
    result = run("tools.export", *words(trained, "kings"))
    assert result.code == 2 and "to=kings exists and is not empty: name another" in result.err
    assert [path.name for path in (tmp_path / "kings").iterdir()] == ["mine"]


def test_a_failure_leaves_no_folder(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("tools.export", *words(trained, "kings"))
    assert not list(tmp_path.iterdir())


def test_an_autoregressive_model_is_no_masked_one(run, trained, tmp_path):
    state = checkpoint.load(trained / "best.pt")
    state["model_config"] = state["model_config"] | {"causal": True}
    checkpoint.save(tmp_path / "ar.pt", state)
    result = run("tools.export", "checkpoint=ar.pt", "to=kings")
    assert result.code == 2 and "ar.pt is autoregressive" in result.err


@pytest.mark.parametrize("word", ["push=kings", "push=a/b/c"])
def test_a_name_that_is_no_repository_is_refused_before_anything_is_done(word, run, trained):
    result = run("tools.export", *words(trained, "kings", word))
    assert result.code == 2 and "write OWNER/NAME" in result.err


def test_a_push_makes_a_private_repository_and_uploads_the_folder(run, trained, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, *args, **kwargs):
            calls.append(("create", args, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs))

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert run("tools.export", *words(trained, "kings")).code == 0
    assert not calls
    assert run("tools.export", *words(trained, "pushed", "push=me/kings")).code == 0
    assert calls == [
        ("create", ("me/kings",), {"private": True, "exist_ok": True}),
        ("upload", {"folder_path": "pushed", "repo_id": "me/kings"}),
    ]
