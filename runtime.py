"""What the scripts share below the command line: device, precision, random numbers, loading."""

import dataclasses
import hashlib
import json
import os
import shutil
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

import data
import diffusion
from model import ModelConfig, Transformer
from nanomdm import bounds, checkpoint, text
from nanomdm.errors import UserError, as_user_error
from nanomdm.tokenizers import TOKENIZERS, load_tokenizer, train_tokenizer

PARTS = ("model_config", "tokenizer", "config", "corpus", "ema")  # of a checkpoint
DATA = dict.fromkeys(("dir", "path", "dataset", "tokenizer"), str) | {"vocab_size": int}
WORTH_COMPILING = 500  # steps on a CPU after which the start-up has been earned back (docs/LOG.md)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes the first of cuda, mps, cpu; each process of a machine a GPU of its own.

    Raises `UserError` for a device that is not there.
    """
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = available[0] if name == "auto" else name
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in available + cards:
        raise UserError(f"system.device={name} is not there: choose auto or {', '.join(available)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, training: bool) -> torch.dtype:
    """`auto` is bfloat16 in training where the hardware multiplies it natively, else float32."""
    names = ("float32", "bfloat16", "float16")
    if name not in (*names, "auto"):
        raise UserError(f"system.dtype={name} is unknown: choose auto, {', '.join(names)}")
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if training and _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in every torch 2
        has = torch.cpu.get_capabilities()
        intel = "intel" in str(has.get("cpu_name")).lower()  # half the speed of its float32
        return bool(has.get("amx_bf16") or has.get("avx512_bf16") and not intel)
    return False


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision: matrix products in `dtype`, weights and sums in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def pays_to_compile(setting: str, device: torch.device, steps: int) -> bool:
    """Whether to use torch.compile for so many steps.

    `auto`: on a GPU always; on a CPU where there is a C++ compiler and the run is long enough.
    """
    if setting not in ("auto", "true", "false"):
        raise UserError(f"system.compile={setting} is unknown: choose auto, true or false")
    if setting != "auto" or device.type != "cpu":
        return setting == "true" or (setting == "auto" and device.type == "cuda")
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return bool(compiler) and headers and steps >= WORTH_COMPILING


def compile_parts(model: Transformer) -> None:
    """torch.compile, in place, of a block (one compilation serves all) and of the large heads.

    Parts and not the whole: it starts sooner, and leaves the hooks of FSDP and DDP where they are.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    if model.device.type == "cuda":
        model.cross_entropy = torch.compile(model.cross_entropy, fullgraph=True, dynamic=False)


def failed_to_compile(error: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # a second, which few commands need

    return isinstance(error, TorchDynamoException)


def move(ids: Tensor, device: torch.device) -> Tensor:
    """ids on the device, by a copy that a GPU's queue need not be empty for."""
    return (
        ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
    )


def generator(seed: int, purpose: str, step: int = 0) -> Generator:
    """The random numbers of (seed, purpose, step): no state has to be saved for an exact resume."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Loaded(NamedTuple):
    """A checkpoint, ready for use."""

    model: Transformer  # with its EMA weights, in evaluation mode
    tokenizer: object
    config: dict  # of the training run
    state: dict  # the whole checkpoint

    @property
    def weights(self) -> str:
        """In words, which weights these are."""
        if "origin" in self.state:
            return f"weights imported from {self.state['origin']}"
        return f"EMA weights after {self.state['step']} steps"


def load(path: str | Path, device: torch.device, resume: bool = False) -> Loaded:
    """Load a checkpoint that train.py wrote, to `resume` the run or to use its averaged weights.

    Raises `UserError` for any other file.
    """
    state = checkpoint.load(path)
    if resume and "optimizer" not in state:
        raise UserError(
            f"{path} holds averaged weights only and cannot be resumed: start from them by "
            "training.init_from="
        )
    try:
        if not {type(state[part]) for part in PARTS} == {dict}:
            raise TypeError(f"{', '.join(PARTS)} are not all there")
        model, tokenizer = build(state), load_tokenizer(state["tokenizer"])
        symbols = {tokenizer.vocab_size, model.config.vocab_size}
        printable = (state["corpus"]["name"] + state["corpus"]["sha256"]).isprintable()
        kinds = [type(state["config"]["data"]), type(state["step"])]
        if len(symbols) > 1 or not printable or kinds != [dict, int]:
            raise TypeError("its parts do not fit each other")
        if resume:
            check_resumable(state)
        return Loaded(model.to(device).eval(), tokenizer, state["config"], state)
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # a checkpoint may come from anywhere and hold anything
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} holds no model of this version ({reason}): train again") from error


def check_resumable(state: dict) -> None:
    """Raise for what train.py could not go on from, beside moments, which `optim` looks at."""
    shapes = [{k: v.shape for k, v in state[name].items()} for name in ("ema", "model")]
    numbers = [state["best"], *state.get("meter", {}).values()]
    if shapes[0] != shapes[1] or not all(type(number) in (int, float) for number in numbers):
        raise TypeError("its weights, or the figures so far, are not what they were")


def build(state: dict) -> Transformer:
    """The network of a checkpoint with its averaged weights, of which it takes no second copy.

    It is built without memory of its own, so that a size that is claimed costs nothing.
    """
    config, weights = ModelConfig(**state["model_config"]), state["ema"]
    if config.n_layer > len(weights):
        raise UserError(f"it has no weights for model.n_layer={config.n_layer}: train again")
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, assign=True)
    return model.float()


def load_corpus(settings: dict, trained: object | None = None, sha256: str = "") -> data.Corpus:
    """The corpus that the `data` section names, fit for the tokenizer `trained` of a checkpoint.

    `dir` (bins) goes before `path`, and `path` before `dataset`. Raises `UserError`; also, before
    anything is written, for another text than the one with this `sha256`.
    """
    for name, kind in DATA.items():
        if type(settings.get(name)) is not kind:
            raise UserError(f"data.{name}={settings.get(name)!r} is not of type {kind.__name__}")
    settings = SimpleNamespace(**settings)
    if settings.dir:
        corpus = open_bins(Path(settings.dir), settings.tokenizer, trained)
        check_hash(corpus.name, corpus.sha256, sha256)
        return corpus
    cache = os.environ.get("NANOMDM_CACHE", "prepared")
    name, content = text.find_text(settings.dataset, settings.path, cache)
    if sha256:
        check_hash(name, data.sha256_of(content.encode()), sha256)
    return prepare(content, name, settings.tokenizer, settings.vocab_size, Path(cache), trained)


def prepare(
    content: str, name: str, kind: str, vocab_size: int, cache: Path, trained: object | None = None
) -> data.Corpus:
    """Tokenize `content`, 90% train and 10% val by characters (as nanoGPT), once for each recipe.

    The tokenizer is made as `kind` and `vocab_size` (bpe) say, unless a `trained` one is given.
    Raises `UserError` for an unknown kind, and for text that the tokenizer lacks symbols for.
    """
    known = [name for name in TOKENIZERS if name != "hf"]  # which weights bring along
    if kind not in known and not (trained and trained.state()["kind"] == kind):
        raise UserError(f"data.tokenizer={kind} is unknown: choose one of {', '.join(known)}")
    sha256 = data.sha256_of(content.encode())
    made = [kind, vocab_size if kind == "bpe" else 0]
    recipe = json.dumps([sha256, trained.state() if trained else made])
    folder = cache / f"{name}-{data.sha256_of(recipe.encode())[:12]}"
    if not (folder / "meta.json").is_file():
        split = int(0.9 * len(content))
        if not split:
            raise UserError(f"{name} has {len(content)} characters: too few to train on")
        tokenizer = trained or train_tokenizer(kind, content, split, vocab_size)
        ids = {"train": tokenizer.encode(content[:split]), "val": tokenizer.encode(content[split:])}
        data.write_bins(folder, ids, tokenizer, {"corpus": name, "sha256": sha256})
    return open_bins(folder)


def open_bins(folder: Path, kind: str = "char", trained: object | None = None) -> data.Corpus:
    """A folder of bins, with its own tokenizer; bins without a meta file have one of this `kind`.

    Raises `UserError`, also for another tokenizer than the `trained` one of a checkpoint.
    """
    meta = data.read_meta(folder, trained.state()["kind"] if trained else kind)
    try:
        own = load_tokenizer(meta["tokenizer"])
    except ValueError as error:
        raise UserError(f"{folder}: {error}: prepare the data again") from error
    if trained is not None and own.state() != trained.state():
        raise UserError(f"{folder} was made with another tokenizer than the checkpoint has")
    return data.open_bins(folder, meta, own)


def require_same(corpus: data.Corpus, trained_on: dict) -> None:
    """Raise `UserError` if a run that is to be resumed was `trained_on` another text."""
    if corpus.sha256 != trained_on["sha256"]:
        raise UserError(
            f"the interrupted run's text ({trained_on['name']}) is not what it was: bring it back, "
            "or start a new run in another out_dir"
        )


def check_hash(name: str, found: str, sha256: str) -> None:
    if sha256 and found != sha256:
        raise UserError(
            f"the text that the checkpoint was trained on ({name}) is not what it was: bring it "
            "back, or name a text by data.path="
        )


def make_model(
    config: SimpleNamespace, explicit: set[str], corpus: data.Corpus, start: Loaded | None
) -> Transformer:
    """A new network, or that of the checkpoint `start`, which decides its shape but not dropout.

    Raises `UserError` where a key that the command line names (`explicit`) would be another shape.
    """
    wanted, kind = vars(config.model), config.data.tokenizer
    causal = config.training.objective == "ar"
    if start:
        shape = dataclasses.replace(start.model.config, dropout=wanted["dropout"], causal=causal)
        named = {f"model.{k}": (v, getattr(shape, k)) for k, v in wanted.items()}
        named["data.tokenizer"] = (kind, start.tokenizer.state()["kind"])
        for key, (value, given) in named.items():
            if key in explicit and value != given:
                raise UserError(
                    f"{key}={value} is not what the checkpoint has ({given}): leave it out (or its "
                    "experiment), or train from the beginning"
                )
        wanted.update((name, getattr(shape, name)) for name in wanted)
    else:
        with as_user_error():
            shape = ModelConfig(corpus.tokenizer.vocab_size, causal=causal, **wanted)
    corpus.require(shape.block_size)
    torch.manual_seed(generator(config.system.seed, "weights").initial_seed())
    model = Transformer(shape)
    if start:
        model.load_state_dict(start.model.state_dict())
    return model


def refuse_what_the_checkpoint_decides(explicit: set[str]) -> None:
    """For sample.py and eval.py: network and tokenizer are given. Raises `UserError`."""
    for key in sorted(explicit):
        if key.startswith("model.") or key in ("data.tokenizer", "data.vocab_size"):
            raise UserError(f"{key} is decided by the checkpoint: leave it out")


def nll(
    model: nn.Module, xt: Tensor, x0: Tensor, is_masked: Tensor, capacity: int | None = None
) -> Tensor:
    """A `Transformer`'s own cross-entropies (B, L), as `diffusion` and `bounds` ask for them."""
    return model(xt, targets=x0, where=is_masked, capacity=capacity)


def passes(
    model: Transformer,
    rows: list[Tensor],
    seed: int,
    draws: int,
    form: bounds.Form = bounds.uniform,
    **options,
) -> bounds.Passes:
    """`bounds.estimate` of rows (L_i,) under a `Transformer`, on masks that follow from `seed`.

    A causal one is scored exactly, in one pass without any masks, whatever `form` and `draws` are.
    """
    return bounds.estimate(
        bounds.everything if model.config.causal else form,
        model,
        [row.to(model.device) for row in rows],
        mask_id=model.config.mask_id,
        generator=generator(seed, "evaluation"),
        draws=1 if model.config.causal else draws,
        **{"nll": nll} | options,
    )


def sampling(section: SimpleNamespace, model: Transformer | None = None) -> diffusion.Sampling:
    """The settings of the reverse process in the `sampling` section. Raises `UserError`.

    An autoregressive `model` is sampled from left to right.
    """
    names = ("strategy", "steps", "temperature", "top_p")
    known = {field.name for field in dataclasses.fields(diffusion.Sampling)}
    if unknown := section.options.keys() - known:
        raise UserError(
            f"sampling.options.{min(unknown)} is unknown: choose some of {sorted(known)}"
        )
    with as_user_error():
        settings = diffusion.Sampling(
            **{name: getattr(section, name) for name in names}, **section.options
        )
    causal = model is not None and model.config.causal
    return dataclasses.replace(settings, strategy="left_to_right") if causal else settings


def fill(
    model: Transformer,
    canvas: Tensor,
    is_masked: Tensor,
    settings: diffusion.Sampling,
    gen: Generator,
    **options,
) -> diffusion.Sampled:
    """`diffusion.sample` of a canvas (B, L), on the model's device."""
    rows = options.pop("rows", torch.arange(len(canvas)))
    return diffusion.sample(
        model,
        canvas.to(model.device),
        is_masked=is_masked.to(model.device),
        mask_id=model.config.mask_id,
        generator=gen,
        rows=rows.to(model.device),
        **dataclasses.asdict(settings),
        **options,
    )
