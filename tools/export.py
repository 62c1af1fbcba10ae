"""A checkpoint as a folder that Hugging Face's transformers load, without this repository.

python -m tools.export checkpoint=out/best.pt to=shakespeare-mdm

The folder holds the EMA weights (safetensors), model.py, diffusion.py and strategies.py as they are
here, a thin wrapper around them, the tokenizer, and a model card. `python -m tools.import_weights`
reads it back.
"""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from model import ModelConfig, Transformer
from nanomdm import cli, report
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, optional
from tools import hf_tokenizer

CODE = ("model.py", "diffusion.py", "nanomdm/strategies.py", "tools/modeling_nanomdm.py", "LICENSE")
LEFT_OUT = (  # settings left out of the card's command: of the machine or of other scripts
    *("system.device", "training.resume", "training.init_from"),
    *("sampling.", "logging.", "eval."),
)


def main(config: Section) -> None:
    check(config)
    loaded = load_model(config.checkpoint, "cpu", Transformer, ModelConfig)
    if loaded.model.config.causal:
        raise UserError(
            f"{config.checkpoint} is autoregressive, not a masked language model: export one of "
            "training.objective=diffusion"
        )
    figures = read_figures(config)
    with new_folder(Path(config.to)) as folder:
        write_network(folder, loaded)
        write_tokenizer(folder, loaded)
        (folder / "README.md").write_text(card(config, loaded, figures), encoding="utf-8")
    print(
        f"{loaded.weights} in {config.to}; the card names their "
        f"licence ({config.licence}) and {'the bound' if figures else 'how to measure the bound'}"
    )
    if config.push:
        push(config.to, config.push)
        print(f"uploaded to {config.push}, a private repository unless it was there before")


def check(config: Section) -> None:
    """Raise `UserError` before anything is computed."""
    if not config.to:
        raise UserError("to= is missing: name the folder to write, as in to=my-model")
    if Path(config.to).exists() and (not Path(config.to).is_dir() or any(os.scandir(config.to))):
        raise UserError(f"to={config.to} exists and is not empty: name another folder")
    if config.push and config.push.count("/") != 1:
        raise UserError(f"push={config.push} is not a repository of the hub: write OWNER/NAME")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        os.replace(folder, path)  # an empty folder may exist there


# --- Files --------------------------------------------------------------------------------------


def write_network(folder: Path, loaded: Loaded) -> None:
    save_file = optional("safetensors.torch").save_file
    weights = {f"transformer.{k}": v.contiguous() for k, v in loaded.state["ema"].items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in CODE:
        shutil.copyfile(cli.ROOT / name, folder / Path(name).name)
    network = loaded.model.config
    about = {
        "architectures": ["NanoMDMForMaskedLM"],
        "model_type": "nanomdm",
        "auto_map": {
            "AutoConfig": "modeling_nanomdm.NanoMDMConfig",
            "AutoModelForMaskedLM": "modeling_nanomdm.NanoMDMForMaskedLM",
        },
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
        "tie_word_embeddings": False,  # model.py shares them by itself
        "vocab_size": network.vocab_size + 1,  # ids that it reads: the mask is one
        "mask_token_id": network.mask_id,
        "eos_token_id": loaded.tokenizer.eos,
        "network": asdict(network),
    }
    write_json(folder / "config.json", about)
    kept = ("tokenizer", "corpus", "step", "best")
    write_json(folder / "nanomdm.json", {k: loaded.state[k] for k in kept if k in loaded.state})


def write_tokenizer(folder: Path, loaded: Loaded) -> None:
    network = loaded.model.config
    converted = hf_tokenizer.convert(loaded.tokenizer, network.vocab_size)
    converted.save(str(folder / "tokenizer.json"))
    about = hf_tokenizer.settings(converted, loaded.tokenizer, network.block_size)
    write_json(folder / "tokenizer_config.json", about)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def push(folder: str, repository: str) -> None:
    """Upload to the hub, as whoever `hf auth login` has logged in."""
    api = optional("huggingface_hub").HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)


# --- The card -----------------------------------------------------------------------------------


def read_figures(config: Section) -> dict | None:
    """The likelihood that eval.py measured, or None. Raises `UserError` for other files."""
    if not config.figures:
        return None
    try:
        figures = json.loads(Path(config.figures).read_text(encoding="utf-8"))
        of, _ = figures["checkpoint"], figures["loss"]["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"figures={config.figures} was not written by eval.py output= ({error!r})"
        ) from error
    if of != config.checkpoint:
        raise UserError(
            f"figures={config.figures} are of {of}, not of {config.checkpoint}: evaluate that one"
        )
    return figures


PAIRS = """
It was trained to answer prompts. The text to fill is a prompt, then `tokenizer.eos_token`, then
masks up to the length of the context.
"""


def card(config: Section, loaded: Loaded, figures: dict | None) -> str:
    """README.md of the folder: what is known, and how to measure what is not."""
    state, network = loaded.state, loaded.model.config
    count = sum(p.numel() for p in loaded.model.parameters())
    text = (cli.ROOT / "tools" / "model_card.md").read_text(encoding="utf-8")
    values = {
        "LICENCE": config.licence,
        "NAME": Path(config.to).resolve().name,
        "PARAMETERS": f"{count:,}",
        "SHAPE": f"{network.n_layer} layers, {network.n_head} heads, {network.n_embd} wide",
        "CONTEXT": f"{network.block_size} tokens{blocks_of(network)}",
        "MASKS": str(min(64, network.block_size)),
        "PAIRS": PAIRS if loaded.layout == "pairs" else "",
        "TOKENIZER": f"{state['tokenizer']['kind']}, {network.vocab_size:,} tokens",
        "CORPUS": corpus_of(state["corpus"]),
        "TRAINING": training_of(state, loaded.config),
        "BOUND": bound_of(config, state, figures),
    }
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def blocks_of(network: ModelConfig) -> str:
    if not network.block_length:
        return ""
    return (
        f", in blocks of {network.block_length}: each is predicted from itself and from those "
        "before it, which have to be without masks. `fill` fills block after block, and refuses a "
        "mask before the block of a given token"
    )


def corpus_of(corpus: dict) -> str:
    return f"{corpus['name']} (sha256 `{corpus['sha256'] or 'unknown'}`)"


def training_of(state: dict, config: dict) -> str:
    if state["origin"]:
        return f"imported from {state['origin']}"
    if not config:
        return "unknown: the checkpoint does not say"
    return f"{state['step']} steps of `{command(config)}`; the weights are their moving average"


def command(config: dict) -> str:
    """The training command: every setting that is not its default, except those of the machine."""
    words, trained = ["python train.py"], cli.flat(config)
    defaults = cli.flat(cli.load_defaults())
    for key, default in (defaults | cli.GONE).items():
        value = trained.get(key, default)
        if "." not in key or key.startswith(LEFT_OUT) or value == default:
            continue
        value = Path(value).name if key in ("data.path", "data.dir") else value
        words.append(
            shlex.quote(f"{key}={str(value).lower() if value in (True, False) else value}")
        )
    return " ".join(words)


def bound_of(config: Section, state: dict, figures: dict | None) -> str:
    """The bound with its error if it was measured, else the lowest value of the run."""
    if figures:
        over = f"{figures['source']}, {figures['tokens']:,} tokens, {figures['draws']} passes"
        bits = figures["bits_per_byte"]
        bits = f", {report.text_of(bits)} bits per byte" if bits else ""
        return f"{report.text_of(figures['loss'])} nats per token{bits} ({over})"
    known = ""
    if "best" in state:
        known = f"{state['best']:.4f} nats per token is the lowest of its run, without its error; "
    name = Path(config.checkpoint).name
    measure = f"python eval.py checkpoint={name} output=figures.json"
    return f"{known}`{measure}` measures it with its error, for `figures=` of tools.export"


if __name__ == "__main__":
    cli.main(main, "tools/export")
