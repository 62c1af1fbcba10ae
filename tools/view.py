"""Shows a text appear out of masks, as a page or a picture: python -m tools.view prompt="ROMEO:"

The page is one self-contained file; the picture is an animated SVG.
"""

from pathlib import Path

from diffusion import sample
from model import ModelConfig, Transformer
from nanomdm import cli, devices, strategies
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, as_user_error
from nanomdm.prompts import with_blanks
from tools.page import assemble
from tools.picture import draw
from tools.trace import canvas_of, record

FORMATS = ("html", "svg")


def main(config: Section) -> None:
    check(config)
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    shape = loaded.model.config
    with as_user_error():
        sampler = strategies.from_config(config.sampling, sample, shape.causal, shape.block_length)
    [prompt] = with_blanks([config.prompt], config.blank)
    canvas = canvas_of(prompt, config.sampling.length, loaded, limit=shape.block_size)
    traces = [[] for _ in range(config.num_samples)]
    filled = record(
        loaded,
        [canvas] * config.num_samples,
        sampler,
        config.seed,
        lambda row, message: traces[row].append(without_ids(message)),
        config.alternatives,
    )
    steps = len(traces[0]) - 1
    subtitle = (
        f"{config.checkpoint} · {sampler.name} ({sampler.label}) · {steps} steps, "
        f"{filled.calls} calls · temperature {config.sampling.temperature:g} · seed {config.seed}"
    )
    if config.format == "svg":
        cli.ignored(config, {"num_samples"}, "format=svg shows the first sample")
        content = draw(traces[0], config.seconds)
    else:
        content = assemble("view", "nanoMDM", {"subtitle": subtitle, "traces": traces})
    write(Path(config.out or f"sample.{config.format}"), content)


def without_ids(message: dict) -> dict:
    """A message without token ids: a page that only shows texts does not need them."""
    return {name: value for name, value in message.items() if name != "ids"}


def check(config: Section) -> None:
    """Raise `UserError` for a setting of the tool's own that is out of its range."""
    if config.format not in FORMATS:
        raise UserError(f"format={config.format} is unknown: choose one of {', '.join(FORMATS)}")
    named = Path(config.out).suffix[1:]
    if named in FORMATS and named != config.format:
        raise UserError(f"out={config.out} is not format={config.format}: set format={named}")
    for name in ("alternatives", "seconds"):
        if (value := getattr(config, name)) < 1:
            raise UserError(f"{name}={value:g} must be at least 1")


def write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write out={path} ({error.strerror}): choose another file"
        ) from error
    print(f"{path}: {len(content.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    cli.main(main, "tools/view")
