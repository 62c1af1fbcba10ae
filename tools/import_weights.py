"""Converts weights of other projects into a checkpoint for sample.py, eval.py and train.py.

python -m tools.import_weights from=GSAI-ML/LLaDA-8B-Base to=llada.pt

It reads SMDM (arXiv 2410.18514; code: ML-GSAI/SMDM), LLaDA (arXiv 2502.09992) and the folders of
tools.export. No code that comes with the weights is loaded. Files are memory-mapped and tensors are
copied one by one: memory holds the weights once, and the largest of them twice.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli
from nanomdm.cli import Section
from nanomdm.errors import UserError, as_user_error
from tools.weight_files import Tensors, fetch, open_tensors, read_json, read_tokenizer

SMDM_HEADS = {  # by width; all have the same context, and V = 32,000
    **{256: 4, 384: 6, 512: 8, 576: 9, 640: 10, 768: 12, 896: 14, 1024: 16},
    **{1280: 10, 1408: 11, 1536: 12, 1792: 14, 2048: 16, 2176: 17},
}
LLADA_IS = {  # properties that no tensor shows
    **{"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True},
    **{"alibi": False, "scale_logits": False, "input_emb_norm": False},
}


class Layout(NamedTuple):
    """How the tensors of another network map to ours."""

    name: str
    network: ModelConfig
    sources: dict[str, list[str]]  # our name: the names whose rows are joined into it
    changes: dict[str, Callable[[Tensor], Tensor]]  # further conversions of some of ours
    surplus: dict[str, int]  # rows that a conversion removes
    mask: int  # the original's id of the mask


def main(config: Section) -> None:
    source, to = vars(config)["from"], Path(config.to)  # config.from is a syntax error
    if not source or not config.to:
        raise UserError("from= and to= are needed, as in from=GSAI-ML/LLaDA-8B-Base to=llada.pt")
    if to.exists():
        raise UserError(f"to={to} exists already: name another file")
    folder, tensors = open_tensors(source, fetch(source, ("*.safetensors", "*.json")))
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    with as_user_error():
        layout = LAYOUTS.get(about.get("model_type"), smdm)(tensors, about, config.n_head)
        if config.block_size:
            network = replace(layout.network, block_size=config.block_size)
            layout = layout._replace(network=network)
    check(layout, tensors)
    if layout.name == "nanoMDM":
        kept = read_json(folder / "nanomdm.json")
    else:
        where = fetch(config.tokenizer, ("tokenizer*.json",)) if config.tokenizer else folder
        tokenizer = read_tokenizer(where, layout.network.vocab_size, layout.mask)
        kept = {"tokenizer": tokenizer, "corpus": {"name": f"that of {source}", "sha256": ""}}
    state = {"model_config": asdict(layout.network), "origin": f"{source} ({layout.name})"} | kept
    state["ema"] = convert(layout, tensors)
    to.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(to, state)
    count = sum(tensor.numel() for tensor in state["ema"].values())
    print(f"{layout.name} of {count:,} parameters from {source} in {to}")


# --- Layouts ------------------------------------------------------------------------------------


def smdm(tensors: Tensors, about: dict, n_head: int) -> Layout:
    """TinyLlama's names; queries, keys and values are stored head by head; the mask is id V."""
    rows, width = matrix_of(tensors, "transformer.wte.weight")
    mlp, _ = matrix_of(tensors, "transformer.h.0.mlp.swiglu.w1.weight")
    heads = n_head or (8 if (width, mlp) == (640, 1600) else SMDM_HEADS.get(width))
    if heads is None:
        raise UserError(f"SMDM has published no width of {width}: set n_head=")
    layers = [re.match(r"transformer\.h\.(\d+)\.", name) for name in tensors.shapes]
    network = ModelConfig(
        vocab_size=rows - 1,
        block_size=2048,
        n_layer=1 + max(int(layer[1]) for layer in layers if layer),
        n_head=heads,
        n_embd=width,
        tie_weights=False,
        qk_norm=False,
        mlp_size=mlp,
        rope_rounded=True,
    )
    outside = {"embedding": ["wte"], "norm": ["ln_f"]}
    inside = {
        "attention_norm": ["norm_1"],
        "attention.qkv": ["attn.attn"],
        "attention.out": ["attn.proj"],
        "mlp_norm": ["norm_2"],
        "mlp.gate_up": ["mlp.swiglu.w1", "mlp.swiglu.w2"],
        "mlp.out": ["mlp.swiglu.w3"],
    }
    sources = name_tensors("transformer.", "h", outside, inside, network.n_layer)
    sources["head.weight"] = ["lm_head.weight"]
    apart = partial(take_apart, n_head=heads)
    changes = {name: apart for name in sources if name.endswith("qkv.weight")}
    return Layout("SMDM", network, sources, changes, {}, network.vocab_size)


def take_apart(qkv: Tensor, n_head: int) -> Tensor:
    """Reorder (3D, D) from head by head to all queries, all keys, all values."""
    return qkv.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)


def llada(tensors: Tensors, about: dict, n_head: int) -> Layout:
    """OLMo's names; the mask's row lies among the others and is exchanged with the last one."""
    for key, value in LLADA_IS.items():
        if about.get(key, value) != value:
            raise UserError(f"{key}={about[key]} in its config.json is not LLaDA's {value}")
    try:
        mask, tied = about["mask_token_id"], about.get("weight_tying", False)
        rows, _ = matrix_of(tensors, "model.transformer.wte.weight")
        network = ModelConfig(
            vocab_size=rows - 1,
            block_size=about["max_sequence_length"],
            n_layer=about["n_layers"],
            n_head=about["n_heads"],
            n_embd=about["d_model"],
            tie_weights=tied,
            qk_norm=False,
            mlp_size=about.get("mlp_hidden_size") or about["mlp_ratio"] * about["d_model"],
            norm_eps=about.get("rms_norm_eps", 1e-5),
            rope_base=about.get("rope_theta", 10000.0),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json is not LLaDA's ({error!r}): fetch it again") from None
    if mask not in range(rows):
        raise UserError(f"mask_token_id={mask} in config.json is not one of {rows} ids")
    outside = {"embedding": ["wte"], "norm": ["ln_f"]} | ({} if tied else {"head": ["ff_out"]})
    inside = {
        "attention_norm": ["attn_norm"],
        "attention.qkv": ["q_proj", "k_proj", "v_proj"],
        "attention.out": ["attn_out"],
        "mlp_norm": ["ff_norm"],
        "mlp.gate_up": ["ff_proj", "up_proj"],
        "mlp.out": ["ff_out"],
    }
    sources = name_tensors("model.transformer.", "blocks", outside, inside, network.n_layer)
    changes = {"embedding.weight": partial(mask_last, mask=mask)}
    changes["head.weight"] = lambda rows: mask_last(rows, mask)[:-1].clone()
    return Layout("LLaDA", network, sources, changes, {"head.weight": 1}, mask)


def mask_last(rows: Tensor, mask: int) -> Tensor:
    """(V + 1, D) with the mask's row and the last one exchanged."""
    rows[[mask, -1]] = rows[[-1, mask]]
    return rows


def own(tensors: Tensors, about: dict, n_head: int) -> Layout:
    """The layout of the folders of tools.export."""
    try:
        network = ModelConfig(**about["network"])
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json was not written by tools.export ({error!r})") from None
    sources = {name: [f"transformer.{name}"] for name in shapes_of(network)}
    return Layout("nanoMDM", network, sources, {}, {}, network.mask_id)


LAYOUTS = {"llada": llada, "nanomdm": own}


def name_tensors(
    root: str, blocks: str, outside: dict, inside: dict, n_layer: int
) -> dict[str, list[str]]:
    """Our names of all weights, each with the original names that it is joined from."""
    named = {f"{name}.weight": [f"{root}{o}.weight" for o in old] for name, old in outside.items()}
    for i in range(n_layer):
        for name, old in inside.items():
            named[f"blocks.{i}.{name}.weight"] = [f"{root}{blocks}.{i}.{o}.weight" for o in old]
    return named


# --- Tensors ------------------------------------------------------------------------------------


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    if name not in tensors.shapes:
        raise UserError(f"{tensors.source} has no tensor {name}: an unknown or incomplete layout")
    return tensors.shapes[name]


def matrix_of(tensors: Tensors, name: str) -> tuple[int, int]:
    shape = shape_of(tensors, name)
    if len(shape) != 2:
        raise UserError(f"{tensors.source} has {name} of shape {shape}, which is not a matrix")
    return shape


def shapes_of(network: ModelConfig) -> dict[str, torch.Size]:
    """The shapes of our own weights."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(network).named_parameters()}


def check(layout: Layout, tensors: Tensors) -> None:
    """Raise `UserError` for the first tensor that is missing, surplus or of another shape."""
    wanted = {}
    for name, (rows, *others) in shapes_of(layout.network).items():
        originals = layout.sources[name]
        rows = rows // len(originals) + layout.surplus.get(name, 0)
        wanted |= {original: (rows, *others) for original in originals}
    for name, shape in wanted.items():
        if (given := shape_of(tensors, name)) != shape:
            raise UserError(f"{tensors.source} has {name} of shape {given}, not {shape}")
    if more := [name for name in tensors.shapes if name not in wanted]:
        raise UserError(f"{tensors.source} has a tensor {more[0]}, which {layout.name} lacks")


def convert(layout: Layout, tensors: Tensors) -> dict[str, Tensor]:
    """Our weights, each copied once, in its own precision."""
    weights = {}
    for name, originals in layout.sources.items():
        joined = torch.cat([tensors.read[original]() for original in originals])
        weights[name] = layout.changes.get(name, lambda rows: rows)(joined)
    return weights


if __name__ == "__main__":
    cli.main(main, "tools/import_weights")
