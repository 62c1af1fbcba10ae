"""Fuzzer: damages files, reads them, and requires a one-line error or a correct result.

python -m tests.stress.fuzz cases=10000

Each case damages a small valid file, reads it as the scripts do and uses the result: a network
fills in a text, a tokenizer encodes one, a corpus gives a batch. Three outcomes are allowed:
`refused`, a mistake that cli.py reports in one line; `same`, the result of the valid file in every
bit; `other`, another result where nothing could reveal the damage, such as another letter in a
text. Everything else is a bug.
"""

import io
import json
import pickle
import resource
import signal
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import data
import diffusion
from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli, optim, prompts, runlog, strategies, text
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, load_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 8
CPU = torch.device("cpu")
CHARACTERS = CharTokenizer("".join(sorted(set(TEXT))))
REFUSALS = (UserError, HydraException, OmegaConfBaseException)  # cli.py prints each in one line


# --- Damage --------------------------------------------------------------------------------------


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """`content` with one range of its bytes cut, flipped, replaced, left out, doubled or moved."""
    size = len(content)
    start = random.randrange(size)
    stop = min(size, start + random.choice((1, 1, 2, 4, 16, 256, size)))
    before, part, after = content[:start], content[start:stop], content[stop:]
    bit, place = 1 << random.randrange(8), random.randrange(size)
    middle = {
        "cut": lambda: content[:start],
        "bit": lambda: before + bytes([part[0] ^ bit]) + part[1:] + after,
        "flip": lambda: before + bytes(b ^ 0xFF for b in part) + after,
        "noise": lambda: before + random.randbytes(len(part)) + after,
        "zeros": lambda: before + bytes(len(part)) + after,
        "ones": lambda: before + b"\xff" * len(part) + after,
        "digits": lambda: before + b"9" * len(part) + after,
        "other": lambda: before + content[place : place + len(part)] + after,
        "left out": lambda: before + after,
        "inserted": lambda: before + random.randbytes(len(part)) + part + after,
        "doubled": lambda: before + part + part + after,
    }
    return middle[random.choice(list(middle))]()


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


HOSTILE = (  # replacements for a value in a file
    *(None, True, False, 0, 1, -1, 3, 2**31, 10**9, 10**12, 2**63, 10**30, -(10**30), 2**1000),
    *(0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "aa", "char", "bpe", "gpt2", "float16", "../../etc/passwd", "/etc/passwd"),
    *("\x1b]0;owned\x07\x1b[2J", "\ud800", "\u202e", "${oc.env:HOME}", "x" * 10**5),
    *([], {}, [1, 2], ["a", None], {"a": 1}, {"kind": "char"}, nested(60), nested(300)),
)
TENSORS = (  # further ones for a value in a checkpoint
    *(lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.zeros(3, 5)),
    *(lambda: torch.zeros(1).expand(10**12), lambda: torch.zeros(1).expand(10**6, 10**6)),
    *(lambda: torch.full((4,), torch.nan), lambda: torch.full((8, 8), torch.inf)),
    *(lambda: torch.zeros(8, 8, dtype=torch.int64), lambda: torch.zeros(4, dtype=torch.complex64)),
    *(lambda: torch.ones(8, dtype=torch.float64), lambda: torch.ones(8, 8, dtype=torch.bool)),
    *(lambda: torch.eye(3).to_sparse(), lambda: torch.nn.Parameter(torch.ones(2)), set),
    *(lambda: bytearray(9), lambda: b"bytes", lambda: 1 + 2j, lambda: torch.Size((2, 3))),
    *(lambda: torch.float32, lambda: torch.device("cpu"), lambda: (1, (2, (3,)))),
)


def damaged_value(value, random: Random, hostile: Callable):
    """A copy of nested containers with one part replaced by `hostile()`, removed or renamed."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if _many(value) else ()
    if not keys or random.random() < 0.1:
        return hostile()
    key = random.choice(list(keys))
    changed, how = dict(value) if isinstance(value, dict) else list(value), random.random()
    if how < 0.1:
        del changed[key]
    elif how < 0.15 and isinstance(value, dict):
        changed[random.choice((f"{key}x", 7))] = changed.pop(key)
    else:
        changed[key] = damaged_value(value[key], random, hostile)
    return tuple(changed) if isinstance(value, tuple) else changed


def _many(value) -> bool:
    return isinstance(value, list | tuple)


@cache
def defaults() -> dict:
    return cli.load_defaults()


def any_value(random: Random):
    return random.choice(HOSTILE)


def any_value_or_tensor(random: Random):
    return random.choice(TENSORS)() if random.random() < 0.5 else any_value(random)


# --- Valid files ---------------------------------------------------------------------------------


def valid_state(tokenizer: CharTokenizer | ByteTokenizer = CHARACTERS) -> dict:
    """What train.py saves, for a tiny network after one step of its optimizer."""
    torch.manual_seed(0)
    config = ModelConfig(tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=8)
    model = Transformer(config)
    optimizer = stepped(model)
    return {
        "model_config": vars(config),
        "tokenizer": tokenizer.state(),
        "config": defaults(),
        "corpus": {"name": "question", "sha256": data.sha256_of(TEXT.encode())},
        "step": 1,
        "best": 4.2,
        "ema": model.state_dict(),
        "model": model.state_dict(),
        "stats": optim.StepStats(CPU, {}).state(),
        "optimizer": optimizer.state_dict(),
    }


def stepped(model: Transformer, state: list | None = None) -> optim.Optimizers:
    """The optimizers of a model, with the given `state`, after a step with made-up gradients."""
    optimizer = optim.build_optimizer(model, "muon", 1e-3, 0.1)
    if state is not None:
        optimizer.load_state_dict(state)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def write_valid(folder: Path) -> None:
    """Write a valid version of every file that the cases damage."""
    checkpoint.save(folder / "ckpt.pt", valid_state())
    tokenizer = CHARACTERS
    splits = {"train": tokenizer.encode(TEXT[:300]), "val": tokenizer.encode(TEXT[300:])}
    data.write_bins(folder / "bins", splits, tokenizer, {"corpus": "question", "sha256": "0" * 64})
    (folder / "nanogpt").mkdir()
    for split in data.SPLITS:
        (folder / "nanogpt" / f"{split}.bin").write_bytes(
            (folder / f"bins/{split}.bin").read_bytes()
        )
    stoi = tokenizer.ids
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    (folder / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (folder / "bpe.json").write_text(BPETokenizer.train(TEXT, len(TEXT), 270).state()["serialized"])
    for name in ("config.yaml", "experiment/medium.yaml"):
        (folder / "configs" / name).parent.mkdir(exist_ok=True)
        (folder / "configs" / name).write_bytes((cli.CONFIGS / name).read_bytes())
    lines = [json.dumps({"step": i, "train/loss": 1 / i}) for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "text.jsonl").write_text(json.dumps({"text": "To be"}) + "\n" + '{"text": "Üß"}\n')
    (folder / "prompts.txt").write_text("To be\nor [MASK*3] to\n\\[MASK] é\n")


# --- Reading and using ---------------------------------------------------------------------------


def use_checkpoint(folder: Path):
    loaded = load_model(folder)
    prompt = torch.from_numpy(loaded.tokenizer.encode(loaded.tokenizer.decode([0])))[None]
    shape = loaded.model.config
    length = min(shape.block_size, 16)
    canvas = torch.nn.functional.pad(prompt, (0, length - 1))[:, :length]
    section = cli.section(defaults()).sampling
    sampler = strategies.from_config(section, diffusion.sample, shape.causal)
    is_masked = torch.arange(length)[None] > 0
    filled = sampler.fill(loaded.model, canvas, is_masked, generator=generator(1, "sample"))
    return loaded.state, loaded.tokenizer.decode(filled.ids[0].tolist())


def load_model(folder: Path, resume: bool = False) -> checkpoint.Loaded:
    return checkpoint.load_model(folder / "ckpt.pt", CPU, Transformer, ModelConfig, resume)


def use_run(folder: Path):
    """What a resumed run takes from the checkpoint besides the averaged weights."""
    loaded, config = load_model(folder, resume=True), cli.section(defaults())
    config.explicit = {"training.max_iters"}
    resumed = cli.resumed(loaded.config, config, whole=False)
    loaded.model.load_state_dict(loaded.state["model"])
    return resumed.as_dict(), stepped(loaded.model, loaded.state["optimizer"]).state_dict()


def use_bins(name: str, folder: Path):
    corpus = data.open_bins(folder / name)
    if len(corpus.train) < 8:
        raise UserError("too short")
    batch, _ = corpus.rows("train", 8, overlap=True).batch(4, torch.Generator().manual_seed(1))
    decoded = [corpus.tokenizer.decode(row) for row in (*batch.tolist(), corpus.val[:].tolist())]
    return corpus.tokenizer.state(), corpus.name, corpus.sha256, corpus.train[:].tolist(), decoded


def use_bpe(folder: Path, kind: str = "bpe"):
    serialized = (folder / "bpe.json").read_bytes().decode("utf-8", "surrogateescape")
    more = {"hf": {"vocab_size": 270, "mask": 270}}.get(kind, {})
    tokenizer = load_tokenizer({"kind": kind, "serialized": serialized} | more)
    ids = tokenizer.encode(TEXT + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!é\x00")
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise AssertionError("an id beyond the vocabulary")
    every = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    return tokenizer.vocab_size, tokenizer.decode(ids.tolist()), every


def use_settings(folder: Path):
    configs, cli.CONFIGS = cli.CONFIGS, folder / "configs"
    try:
        return cli.compose([], "medium").as_dict()
    finally:
        cli.CONFIGS = configs


def use_metrics(folder: Path):
    with runlog.open_metrics(folder / "metrics.jsonl", 5):
        pass
    return (folder / "metrics.jsonl").read_bytes()


def use_texts(folder: Path):
    lines = prompts.read_lines(folder / "prompts.txt")
    return [prompts.parse(line) for line in lines], text.read_text(folder / "text.jsonl")


# --- Kinds ---------------------------------------------------------------------------------------


def spoil_bytes(names: list[str], folder: Path, random: Random) -> None:
    path = folder / random.choice(names)
    path.write_bytes(damaged_bytes(path.read_bytes(), random))


def spoil_state(parts: list[str], folder: Path, random: Random) -> None:
    """Write a valid archive of invalid values, as an attacker could."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    hostile = partial(any_value_or_tensor, random)
    part = random.choice(parts)
    state[part] = damaged_value(state[part], random, hostile)
    if random.random() < 0.05:
        state = damaged_value(state, random, hostile)
    torch.save(state, folder / "ckpt.pt")


def spoil_pickle(folder: Path, random: Random) -> None:
    """Damage the pickle of tensors and values, and give it a correct checksum."""

    def change(name: str, content: bytes) -> tuple[str, bytes, int]:
        pickled = name.endswith("data.pkl")
        return name, damaged_bytes(content, random) if pickled else content, zipfile.ZIP_STORED

    rewrite(folder / "ckpt.pt", change)


def spoil_archive(folder: Path, random: Random) -> None:
    """Rename, double, empty, enlarge or deflate entries of the archive."""

    def change(name: str, content: bytes) -> tuple[str, bytes, int]:
        how, kind = random.random(), zipfile.ZIP_STORED
        if how < 0.03:
            name = random.choice(("archive/data/0", "../../x", "/etc/passwd", "archive/DATA.PKL"))
        elif how < 0.05:
            content = random.choice((b"", content * 2, bytes(10**6)))
        elif how < 0.08:
            content, kind = bytes(10**7), zipfile.ZIP_DEFLATED
        return name, content, kind

    rewrite(folder / "ckpt.pt", change)


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes, int]]) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            name, content, kind = change(info.filename, old.read(info))
            with warnings.catch_warnings(action="ignore"):  # about duplicate names
                new.writestr(zipfile.ZipInfo(name), content, kind)
    path.write_bytes(made.getvalue())


def spoil_json(name: str, folder: Path, random: Random) -> None:
    path = folder / name
    values = json.loads(path.read_text())
    values.pop("check", None)
    path.write_text(json.dumps(damaged_value(values, random, partial(any_value, random))))


def spoil_settings(folder: Path, random: Random) -> None:
    path = folder / "configs" / "experiment" / "medium.yaml"
    values = dict(OmegaConf.to_container(OmegaConf.load(path)))
    changed = damaged_value(values, random, partial(any_value, random))
    path.write_text(json.dumps(changed))  # JSON is YAML, too


class Kind(NamedTuple):
    """How files are damaged, how they are read, and whether every change must be noticed."""

    share: int
    spoil: Callable[[Path, Random], None]
    use: Callable[[Path], object]
    checked: bool = False


BINS = ["bins/train.bin", "bins/val.bin", "bins/meta.json"]
NANOGPT = ["nanogpt/train.bin", "nanogpt/val.bin", "nanogpt/meta.pkl"]
SETTINGS = ["configs/config.yaml", "configs/experiment/medium.yaml"]
STATE = ["model_config", "tokenizer", "config", "corpus", "step", "ema"]
RUN = ["optimizer", "optimizer", "config", "model", "best", "stats"]
KINDS = {
    "checkpoint bytes": Kind(8, partial(spoil_bytes, ["ckpt.pt"]), use_checkpoint, checked=True),
    "checkpoint values": Kind(4, partial(spoil_state, STATE), use_checkpoint),
    "checkpoint pickle": Kind(4, spoil_pickle, use_checkpoint),
    "checkpoint archive": Kind(1, spoil_archive, use_checkpoint),
    "resumed values": Kind(3, partial(spoil_state, RUN), use_run),
    "bins bytes": Kind(6, partial(spoil_bytes, BINS), partial(use_bins, "bins"), checked=True),
    "meta values": Kind(4, partial(spoil_json, "bins/meta.json"), partial(use_bins, "bins")),
    "nanogpt bytes": Kind(3, partial(spoil_bytes, NANOGPT), partial(use_bins, "nanogpt")),
    "bpe bytes": Kind(2, partial(spoil_bytes, ["bpe.json"]), use_bpe),
    "bpe values": Kind(3, partial(spoil_json, "bpe.json"), use_bpe),
    "hf values": Kind(2, partial(spoil_json, "bpe.json"), partial(use_bpe, kind="hf")),
    "settings bytes": Kind(1, partial(spoil_bytes, SETTINGS), use_settings),
    "settings values": Kind(1, spoil_settings, use_settings),
    "metrics bytes": Kind(2, partial(spoil_bytes, ["metrics.jsonl"]), use_metrics),
    "texts bytes": Kind(2, partial(spoil_bytes, ["text.jsonl", "prompts.txt"]), use_texts),
}


# --- Cases ---------------------------------------------------------------------------------------


WHAT = ("refused", "same", "other", "bug")


class Outcome(NamedTuple):
    what: str  # one of WHAT
    seconds: float
    why: str = ""


@contextmanager
def no_longer_than(seconds: float):
    def ring(number, frame):
        raise TimeoutError(f"a hang: not finished after {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def fingerprint(value) -> str:
    """A hash of nested values, including every bit of the tensors."""
    if isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8)
        value = [str(value.dtype), tuple(value.shape), content.tolist()]
    elif isinstance(value, dict):
        value = [(key, fingerprint(part)) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        value = [fingerprint(part) for part in value]
    return sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def run_kind(name: str, cases: int, config: Section) -> list[Outcome]:
    kind, outcomes = KINDS[name], []
    with TemporaryDirectory() as made:
        folder = Path(made)
        write_valid(folder)
        valid = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        expected = fingerprint(kind.use(folder))
        for number in range(config.first, config.first + cases):
            for path, content in valid.items():
                path.write_bytes(content)
            kind.spoil(folder, Random(f"{config.seed}/{name}/{number}"))
            outcome = outcome_of(kind, folder, expected, config.limit)
            if outcome.what == "bug":
                print(f"{name} {number}: {outcome.why}", flush=True)
            outcomes.append(outcome)
    return outcomes


def outcome_of(kind: Kind, folder: Path, expected: str, limit: float) -> Outcome:
    start = time.perf_counter()
    try:
        with no_longer_than(limit):
            found = fingerprint(kind.use(folder))
    except REFUSALS:
        what, why = "refused", ""
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        what, why = "bug", f"{type(error).__name__}: {error}"
    else:
        what, why = ("same", "") if found == expected else ("other", "")
        if kind.checked and what == "other":
            what, why = "bug", "silent corruption: the file was read as something else"
    return Outcome(what, time.perf_counter() - start, why[:300])


def print_totals(rows: list[dict], seconds: float, config: Section) -> None:
    """Print and write the totals. Raises `RuntimeError` if there was a bug."""
    total = {what: sum(row[what] for row in rows) for what in ("cases", *WHAT)}
    print(
        f"{total['cases']:,} cases in {seconds:.0f} s: {total['refused']:,} refused, "
        f"{total['same']:,} the same, {total['other']:,} other, {total['bug']} bugs; peak memory "
        f"{memory() / 2**20:,.0f} MiB"
    )
    if config.output:
        figures = {"seed": config.seed, "kinds": rows, "seconds": seconds, "memory": memory()}
        Path(config.output).write_text(json.dumps(figures, indent=1))
    if total["bug"]:
        raise RuntimeError(f"{total['bug']} bugs: see above, and repeat one with kinds= and first=")


def memory() -> int:
    """The peak memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(config: Section) -> None:
    if config.cases < 1 or config.limit <= 0:
        raise UserError("cases and limit must be positive")
    if unknown := [name for name in config.kinds if name not in KINDS]:
        raise UserError(f"kinds={unknown[0]} is unknown: choose some of {', '.join(KINDS)}")
    kinds = {name: KINDS[name].share for name in config.kinds or KINDS}
    rows, start = [], time.perf_counter()
    print(f"{'kind':<19} {'cases':>6} {'refused':>8} {'same':>6} {'other':>6} {'bugs':>5}  slowest")
    for name, share in kinds.items():
        cases = -(-config.cases * share // sum(kinds.values()))
        outcomes = run_kind(name, cases, config)
        counts = Counter(outcome.what for outcome in outcomes)
        row = {"kind": name, "cases": cases} | {w: counts[w] for w in WHAT}
        row["slowest"] = max(outcome.seconds for outcome in outcomes)
        rows.append(row)
        print(
            f"{name:<19} {cases:>6} {row['refused']:>8} {row['same']:>6} {row['other']:>6} "
            f"{row['bug']:>5}  {1e3 * row['slowest']:.0f} ms",
            flush=True,
        )
    print_totals(rows, time.perf_counter() - start, config)


if __name__ == "__main__":
    cli.main(main, "stress/fuzz")
