"""Weights of other projects: equal logits, the tokenizer's ids, and no tensor unaccounted for."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import TEXT, Result, load_model
from torch import Tensor

import nanomdm
from model import ModelConfig, Transformer
from nanomdm import checkpoint
from nanomdm.checkpoint import Loaded
from nanomdm.tokenizers import BPETokenizer, CharTokenizer, HFTokenizer, load_tokenizer
from tools import hf_tokenizer, import_weights, weight_files

safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
WIDTH, HEADS, MLP, LAYERS, VOCAB = 32, 4, 48, 2, 300  # of the made-up networks
CPU = torch.device("cpu")


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights so large that every part of a network matters."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=g) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def smdm_weights() -> dict[str, Tensor]:
    """The names and shapes of SMDM's TransEncoder (lit_gpt/diffmodel.py)."""
    shapes = {"lm_head.weight": (VOCAB, WIDTH), "transformer.wte.weight": (VOCAB + 1, WIDTH)}
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        shapes |= {h + "norm_1.weight": (WIDTH,), h + "norm_2.weight": (WIDTH,)}
        shapes |= {h + "attn.attn.weight": (3 * WIDTH, WIDTH)}
        shapes |= {h + "attn.proj.weight": (WIDTH, WIDTH)}
        shapes |= {h + f"mlp.swiglu.w{j}.weight": (MLP, WIDTH) for j in (1, 2)}
        shapes |= {h + "mlp.swiglu.w3.weight": (WIDTH, MLP)}
    return draw(shapes | {"transformer.ln_f.weight": (WIDTH,)})


MASK = 290  # of the LLaDA, whose vocabulary has VOCAB rows with it
LLADA = {
    **{"model_type": "llada", "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS},
    **{"mlp_hidden_size": MLP, "max_sequence_length": 64, "rope_theta": 500.0},
    **{"rms_norm_eps": 0.01, "mask_token_id": MASK, "block_type": "llama", "weight_tying": False},
    **{"activation_type": "silu", "layer_norm_type": "rms", "rope": True, "scale_logits": False},
}


def llada_weights() -> dict[str, Tensor]:
    """The names and shapes of LLaDA's LLaDAModelLM (modeling_llada.py)."""
    root, square = "model.transformer.", (WIDTH, WIDTH)
    shapes = {root + "wte.weight": (VOCAB, WIDTH), root + "ff_out.weight": (VOCAB, WIDTH)}
    for i in range(LAYERS):
        h = f"{root}blocks.{i}."
        shapes |= {f"{h}{name}.weight": (WIDTH,) for name in ("attn_norm", "ff_norm")}
        shapes |= {f"{h}{n}.weight": square for n in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{h}{name}.weight": (MLP, WIDTH) for name in ("ff_proj", "up_proj")}
        shapes |= {h + "ff_out.weight": (WIDTH, MLP)}
    return draw(shapes | {root + "ln_f.weight": (WIDTH,)})


# --- The original network, written from the papers ----------------------------------------------


def smdm_layers(w: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """(norm, q, k, v, out, norm, gate, up, down); a head has its q, k and v one below the other."""
    found, K = [], WIDTH // HEADS
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        pieces = w[h + "attn.attn.weight"].split(K)
        q, k, v = (torch.cat(pieces[j::3]) for j in range(3))
        mlp = [w[f"{h}mlp.swiglu.w{j}.weight"] for j in (1, 2, 3)]
        norms = [w[h + f"norm_{j}.weight"] for j in (1, 2)]
        found.append((norms[0], q, k, v, w[h + "attn.proj.weight"], norms[1], *mlp))
    return found


def llada_layers(w: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    names = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj")
    return [
        tuple(w[f"model.transformer.blocks.{i}.{n}.weight"] for n in (*names, "up_proj", "ff_out"))
        for i in range(LAYERS)
    ]


def normalised(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def llama(ids, embedding, layers, norm, head, eps: float, base: float, eight_bits: bool) -> Tensor:
    """Llama without its causal mask, row by row and head by head, in float64.

    RoPE turns the complex numbers x[k] + i x[k + K/2] by the angle position / base^(2k/K).
    """
    K, logits = WIDTH // HEADS, []
    angles = torch.outer(torch.arange(ids.size(1)), 1 / base ** (torch.arange(0, K, 2) / K))
    turn = [angles.cos(), angles.sin()]
    turn = torch.complex(*[(t.bfloat16() if eight_bits else t).double() for t in turn])

    def turned(x: Tensor) -> Tensor:  # (L, K)
        y = torch.complex(x[:, : K // 2], x[:, K // 2 :]) * turn
        return torch.cat((y.real, y.imag), dim=-1)

    for row in ids:
        x = embedding[row].double()  # (L, D)
        for weights in layers:
            norm_1, q, k, v, out, norm_2, gate, up, down = (w.double() for w in weights)
            y, heads = normalised(x, norm_1, eps), []
            for part in torch.arange(WIDTH).split(K):
                scores = turned(y @ q[part].T) @ turned(y @ k[part].T).T / K**0.5
                heads.append(scores.softmax(dim=-1) @ (y @ v[part].T))
            x = x + torch.cat(heads, dim=-1) @ out.T
            y = normalised(x, norm_2, eps)
            g = y @ gate.T
            x = x + (g / (1 + (-g).exp()) * (y @ up.T)) @ down.T
        logits.append(normalised(x, norm.double(), eps) @ head.double().T)
    return torch.stack(logits)


# --- Folders as they are published --------------------------------------------------------------


def llama_tokenizer(size: int):
    """As Llama 2's: bytes where there is no token, and a space put before every text."""
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "k", "i", "n", "g", "K", "I", "N", "G"]
    known = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    ids = {token: i for i, token in enumerate(known)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    bpe = tokenizers.models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(bpe)
    n, d = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    assert made.get_vocab_size() <= size
    return made


def llada_tokenizer():
    """Byte-level, the mask among special tokens, and rows left over behind them."""
    trained = BPETokenizer.train(TEXT, len(TEXT), 280)
    made = tokenizers.Tokenizer.from_str(trained.state()["serialized"])
    special = ["<|endoftext|>", *(f"<|reserved_{i}|>" for i in range(9)), "<|mdm_mask|>", "<|eot|>"]
    made.add_special_tokens(special)
    made.decoder = tokenizers.decoders.ByteLevel()
    assert made.token_to_id("<|mdm_mask|>") == MASK
    return made


def write_folder(folder: Path, weights: dict, tokenizer, about: dict, eos: str, **splits) -> Path:
    folder.mkdir()
    for name, part in (splits or {"model": weights}).items():
        chosen = {k: weights[k] for k in part}
        safetensors.save_file(chosen, folder / f"{name}.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    if about:
        (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def smdm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smdm") / "mdm"
    return write_folder(folder, smdm_weights(), llama_tokenizer(VOCAB), {}, "</s>")


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    """In two shards, between which a layer is torn apart."""
    weights = llada_weights()
    names = sorted(weights)
    splits = {"model-1-of-2": names[::2], "model-2-of-2": names[1::2]}
    eos = {"content": "<|endoftext|>", "special": True}
    folder = tmp_path_factory.mktemp("llada") / "8B"
    return write_folder(folder, weights, llada_tokenizer(), LLADA, eos, **splits)


@pytest.fixture
def imported(run):
    """imported(source, ...): the tool's result, and the checkpoint where it wrote one."""

    def imported(source, *words: str) -> tuple[Result, Loaded | None]:
        result = run("tools.import_weights", f"from={source}", "to=ckpt.pt", *words)
        return result, load_model("ckpt.pt") if result.code == 0 else None

    return imported


def ids_with(mask: int, size: int) -> Tensor:
    """(3, 20) ids, a third of them masks."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, size, (3, 20), generator=g)
    return torch.where(torch.rand(ids.shape, generator=g) < 1 / 3, mask, ids)


# --- Logits -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_smdm_has_the_logits_of_the_original(form, smdm, imported, tmp_path):
    w, ids, source = smdm_weights(), ids_with(VOCAB, VOCAB), smdm
    if form == "pth":  # as its training code saves it
        source = tmp_path / "iter-1.pth"
        torch.save({"model": w, "optimizer": {}, "hparams": {"seed": 1}, "iter_num": 4}, source)
    _, loaded = imported(source, f"n_head={HEADS}", f"tokenizer={smdm}")
    ends = w["transformer.ln_f.weight"], w["lm_head.weight"]
    expected = llama(
        ids, w["transformer.wte.weight"], smdm_layers(w), *ends, 1e-5, 10000.0, eight_bits=True
    )
    assert expected.std() > 1
    torch.testing.assert_close(loaded.model(ids).double(), expected, atol=1e-4, rtol=0)
    assert loaded.model.config.block_size == 2048 and loaded.model.config.mask_id == VOCAB


@torch.no_grad()
def test_llada_has_the_logits_of_the_original_but_for_the_mask(llada, imported):
    w, ids = llada_weights(), ids_with(MASK, MASK)
    _, loaded = imported(llada)
    root = "model.transformer."
    ends = w[root + "ln_f.weight"], w[root + "ff_out.weight"]
    expected = llama(
        ids, w[root + "wte.weight"], llada_layers(w), *ends, 0.01, 500.0, eight_bits=False
    )
    V = loaded.model.config.mask_id
    assert V == VOCAB - 1
    logits = loaded.model(torch.where(ids == MASK, V, ids)).double()
    others = torch.arange(VOCAB - 1) != MASK
    torch.testing.assert_close(
        logits[..., others], expected[..., :-1][..., others], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(logits[..., MASK], expected[..., -1], atol=1e-4, rtol=0)
    assert loaded.model.config.block_size == 64


@torch.no_grad()
def test_a_tied_llada_has_the_logits_of_the_original(llada, imported, tmp_path):
    w, ids, root = llada_weights(), ids_with(MASK, MASK), "model.transformer."
    head = w.pop(root + "ff_out.weight")
    about = LLADA | {"weight_tying": True}
    folder = write_folder(tmp_path / "tied", w, llada_tokenizer(), about, "<|endoftext|>")
    _, loaded = imported(folder)
    head, layers = w[root + "wte.weight"], llada_layers(w)
    expected = llama(ids, head, layers, w[root + "ln_f.weight"], head, 0.01, 500.0, False)
    logits = loaded.model(torch.where(ids == MASK, VOCAB - 1, ids)).double()
    torch.testing.assert_close(logits[..., :MASK], expected[..., :MASK], atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_was_exported_comes_back_with_its_logits_and_its_tokenizer(run, trained, imported):
    assert run("tools.export", f"checkpoint={trained}/best.pt", "to=kings").code == 0
    result, loaded = imported("kings")
    ours = load_model(trained / "best.pt")
    ids = ids_with(ours.model.config.mask_id, ours.model.config.vocab_size)
    assert torch.equal(loaded.model(ids), ours.model(ids))
    assert loaded.tokenizer.state() == ours.tokenizer.state()
    kept = ("corpus", "step", "best")
    assert [loaded.state[k] for k in kept] == [ours.state[k] for k in kept]


def test_an_export_of_an_earlier_version_comes_back_without_a_gate(run, imported):
    network = ModelConfig(3, block_size=8, n_layer=1, n_head=2, n_embd=8, attention_gate=False)
    nanomdm.save("before.pt", Transformer(network), CharTokenizer("abc"))
    assert run("tools.export", "checkpoint=before.pt", "to=before").code == 0
    about = json.loads(Path("before/config.json").read_text())
    del about["network"]["attention_gate"]  # a later field
    Path("before/config.json").write_text(json.dumps(about))
    assert imported("before")[1].model.config == network


def test_weights_keep_their_precision_and_the_context_may_be_another(smdm, imported, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in smdm_weights().items()}
    safetensors.save_file(half, tmp_path / "half.safetensors")
    words = (f"n_head={HEADS}", f"tokenizer={smdm}", "block_size=24")
    _, loaded = imported(tmp_path / "half.safetensors", *words)
    assert {tensor.dtype for tensor in loaded.state["ema"].values()} == {torch.bfloat16}
    assert loaded.model.config.block_size == 24


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head.weight": None}, "no tensor lm_head.weight"),
        ({"transformer.h.1.norm_2.weight": None}, "no tensor transformer.h.1.norm_2.weight"),
        ({"transformer.wte.weight": None}, "no tensor transformer.wte.weight"),
        ({"transformer.wte.weight": (VOCAB,)}, "of shape (300,), which is not a matrix"),
        ({"lm_head.bias": (VOCAB,)}, "a tensor lm_head.bias, which SMDM lacks"),
        ({"transformer.wte.weight": (VOCAB, WIDTH)}, "lm_head.weight of shape (300, 32), not (299"),
        ({"transformer.h.0.attn.attn.weight": (48, WIDTH)}, "of shape (48, 32), not (96, 32)"),
        ({"transformer.h.1.mlp.swiglu.w2.weight": (47, WIDTH)}, "w2.weight of shape (47, 32)"),
    ],
)
def test_a_tensor_that_is_missing_surplus_or_of_another_shape_is_named(
    change, said, smdm, imported, tmp_path
):
    weights = smdm_weights() | draw({k: v for k, v in change.items() if v})
    weights = {k: v for k, v in weights.items() if change.get(k, ()) is not None}
    safetensors.save_file(weights, tmp_path / "w.safetensors")
    result, _ = imported(tmp_path / "w.safetensors", f"n_head={HEADS}", f"tokenizer={smdm}")
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("activation_type", "gelu", "activation_type=gelu"),
        ("scale_logits", True, "scale_logits=True"),
        ("n_heads", None, "KeyError('n_heads')"),
        ("n_layers", "two", "model.n_layer='two' is not of type int"),
        ("mask_token_id", VOCAB, "mask_token_id=300 in config.json is not one of 300 ids"),
        ("n_layers", 1, "blocks.1.attn_norm.weight, which LLaDA lacks"),
    ],
)
def test_a_llada_of_another_kind_is_refused(key, value, said, llada, imported, tmp_path):
    folder, about = (
        tmp_path / "other",
        {k: v for k, v in (LLADA | {key: value}).items() if v is not None},
    )
    write_folder(folder, llada_weights(), llada_tokenizer(), about, "<|endoftext|>")
    result, _ = imported(folder)
    assert result.code == 2 and said in result.err


def test_the_heads_of_a_width_that_was_not_published_have_to_be_named(smdm, imported):
    result, _ = imported(smdm)
    assert result.code == 2 and "no width of 32: set n_head=" in result.err


@pytest.mark.parametrize(
    ("width", "mlp", "heads"), [(640, 2560, 10), (640, 1600, 8), (1792, 7168, 14)]
)
def test_the_heads_of_a_published_width_are_known(width, mlp, heads):
    names = ("transformer.wte.weight", "transformer.h.0.mlp.swiglu.w1.weight")
    shapes = dict(zip(names, [(VOCAB + 1, width), (mlp, width)], strict=True))
    found = import_weights.smdm(weight_files.Tensors("x", shapes, {}), {}, n_head=0)
    assert found.network.n_head == heads


def test_a_file_that_wants_to_run_code_is_refused(smdm, imported, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    result, _ = imported(tmp_path / "evil.pth")
    assert result.code == 2 and "more than plain data" in result.err
    assert not (tmp_path / "ran").exists()


def test_what_is_there_is_not_written_over(smdm, imported, tmp_path):
    (tmp_path / "ckpt.pt").write_text("dear")
    result, _ = imported(smdm, f"n_head={HEADS}")
    assert result.code == 2 and "to=ckpt.pt exists already" in result.err
    assert (tmp_path / "ckpt.pt").read_text() == "dear"


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "a//b", "no such/name"])
def test_a_source_that_is_not_there_is_named(source, imported):
    result, _ = imported(source)
    assert result.code == 2 and source in result.err and result.err.count("\n") == 1


def test_the_hub_is_asked_for_weights_and_json_only(smdm, imported, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(smdm),
    )
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file: asked.append((name, file)) or str(smdm / "model.safetensors"),
    )
    words = (f"n_head={HEADS}", "tokenizer=Tiny/Llama")
    assert imported("them/SMDM/some/mdm.safetensors", *words)[0].code == 0
    assert asked == [("them/SMDM", "some/mdm.safetensors"), ("Tiny/Llama", ["tokenizer*.json"])]
    assert weight_files.fetch("them/LLaDA", ("*.safetensors", "*.json")) == smdm


# --- Tokenizers ---------------------------------------------------------------------------------


def texts(count: int = 150) -> list[str]:
    rng, ranges = random.Random(3), [(32, 127), (0, 0xD800), (0x10000, 0x110000), (9, 14)]
    made = ["the king", " the  the", "é the\n", ""]
    for _ in range(count):
        made.append(
            "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(9)))
        )
    return [text for text in made if "\u2581" not in text]


def test_a_llama_tokenizer_gives_any_text_back_with_the_original_ids_behind_a_space(smdm):
    ours = load_tokenizer(weight_files.read_tokenizer(smdm, VOCAB, VOCAB))
    original = llama_tokenizer(VOCAB)
    for text in texts():
        if text:
            assert ours.encode(" " + text).tolist() == original.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos == 2 and ours.vocab_size == VOCAB
    assert ours.decode([VOCAB - 1]) == "\ufffd"


def test_a_metaspace_that_puts_a_space_before_a_text_is_kept_from_it(tmp_path):
    made = llama_tokenizer(VOCAB)
    made.normalizer = None
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(weight_files.read_tokenizer(tmp_path, VOCAB, VOCAB))
    assert ours.encode(" the").tolist() == made.encode("the").ids
    assert ours.decode(ours.encode("the king")) == "the king"


def test_a_llada_tokenizer_has_the_original_ids_and_refuses_the_mask(llada):
    ours = load_tokenizer(weight_files.read_tokenizer(llada, VOCAB - 1, MASK))
    original = llada_tokenizer()
    for text in [*texts(), "<|eot|> and <|endoftext|>"]:
        ids = ours.encode(text)
        assert ids.tolist() == original.encode(text).ids
        assert ours.decode(ids) == text
    assert ours.eos == original.token_to_id("<|endoftext|>")
    with pytest.raises(ValueError, match=r"<\|mdm_mask\|>, which is this model's mask"):
        ours.encode("The <|mdm_mask|>")


def test_the_last_token_stands_in_the_place_of_the_mask():
    made = llada_tokenizer()
    V = made.get_vocab_size() - 1
    ours = HFTokenizer(made.to_str(), V, MASK)
    assert ours.encode("<|eot|>").tolist() == [MASK]
    assert ours.decode([MASK]) == "<|eot|>"


@pytest.mark.parametrize("kind", ["smdm", "llada"])
def test_an_imported_tokenizer_is_exported_with_its_ids(kind, request):
    V, mask = (VOCAB, VOCAB) if kind == "smdm" else (VOCAB - 1, MASK)
    state = weight_files.read_tokenizer(request.getfixturevalue(kind), V, mask)
    ours = load_tokenizer(state)
    theirs = hf_tokenizer.convert(ours, V)
    for text in texts():
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.token_to_id("[MASK]") == V and theirs.get_vocab_size() == V + 1


def test_an_exported_tokenizer_has_the_last_token_in_the_place_of_the_mask():
    made = llada_tokenizer()
    V = made.get_vocab_size() - 1
    theirs = hf_tokenizer.convert(HFTokenizer(made.to_str(), V, MASK), V)
    assert theirs.encode("<|eot|>[MASK]").ids == [MASK, V]


def test_a_tokenizer_of_more_tokens_than_the_network_has_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has 274 tokens, the network 270"):
        HFTokenizer(llama_tokenizer(VOCAB).to_str(), 270, 270)


# --- Afterwards ---------------------------------------------------------------------------------


def test_the_scripts_run_on_imported_weights_and_fine_tune_them(llada, imported, run, tmp_path):
    imported(llada)
    (tmp_path / "text.txt").write_text(TEXT)
    cpu = ("system.device=cpu", "system.dtype=float32", "system.compile=false")
    sampled = run("sample.py", "checkpoint=ckpt.pt", "prompt=KING", "sampling.steps=4", *cpu)
    assert sampled.code == 0 and sampled.out.startswith("KING")
    assert f"weights imported from {llada} (LLaDA)" in sampled.err
    assert run("tools.view", "checkpoint=ckpt.pt", "prompt=KING", "sampling.steps=4").code == 0
    quick = ("data.path=text.txt", "eval.tokens=256", "eval.draws=2")
    before = run("eval.py", "checkpoint=ckpt.pt", *quick, *cpu)
    assert before.code == 0 and "nats/token" in before.out
    unknown = run("eval.py", "checkpoint=ckpt.pt", *cpu)
    assert unknown.code == 2 and "is not known: name one by data.path=" in unknown.err
    few = ("training.max_iters=20", "training.batch_size=8", "training.optimizer=adamw")
    few += ("training.warmup_iters=1", "training.eval_interval=0", "training.sample_interval=0")
    words = ("training.init_from=ckpt.pt", "data.path=text.txt", "out_dir=tuned", *few, *cpu)
    assert run("train.py", *words).code == 0
    network = checkpoint.load("tuned/ckpt.pt")["model_config"]
    assert network == checkpoint.load("ckpt.pt")["model_config"]
    after = run("eval.py", "checkpoint=tuned/ckpt.pt", *quick, *cpu)
    assert loss_of(after) < loss_of(before) - 0.5


def loss_of(result: Result) -> float:
    return float(result.out.split("loss ")[1].split()[0])
