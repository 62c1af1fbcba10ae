"""Weights & Biases: starts a run there, offline where the server cannot be reached."""

import os
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace

from . import folders
from .errors import UserError


def start_wandb(config: SimpleNamespace, about: dict):
    """Start a W&B run, or go on in that of `about["wandb_id"]`, with configuration and `about`.

    Without a login or a network the run is offline, and a line on stderr says so. The environment
    variable WANDB_MODE takes precedence.
    """
    import wandb

    mode, settings = os.environ.get("WANDB_MODE") or None, config.logging
    if mode is None and (reason := why_offline()):
        mode = "offline"
        print(f"W&B is offline ({reason}): WANDB_MODE=online tries anyway", file=sys.stderr)
    try:
        return wandb.init(
            project=settings.project,
            name=settings.name or None,
            tags=settings.tags,
            mode=mode,
            dir=config.out_dir,
            id=about.get("wandb_id"),
            resume="allow",
            config=config.as_dict() | about,
        )
    except (wandb.Error, ValueError) as error:
        raise UserError(f"W&B: {error}: log in, or set WANDB_MODE=offline") from error


def run_id(out_dir: str, first_step: int) -> str:
    """The W&B run that a resumed run goes on in, as run.json says; a new one at step 0.

    The environment variable WANDB_RUN_ID takes precedence.
    """
    before = folders.entries(out_dir) if first_step else []
    ids = [entry["wandb_id"] for entry in before if entry.get("wandb_id")]
    return os.environ.get("WANDB_RUN_ID") or (ids[-1] if ids else secrets.token_hex(4))


def log_evaluation(config: SimpleNamespace, figures: dict) -> None:
    """Send an evaluation's figures (nanomdm/report.py) and curve, as a run of their own."""
    import wandb

    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    run = start_wandb(config, {"evaluated": figures["checkpoint"]})
    rows = {row["name"]: row for row in figures.get("samplers", ())}
    rows |= {name: figures[name] for name in ("loss", "bits_per_byte") if figures[name]}
    for name, row in rows.items():
        run.log({f"eval/{name}": row["value"], f"eval/{name}_error": row["standard_error"]})
    if "curve" in figures:
        points = [[(row["low"] + row["high"]) / 2, row["value"]] for row in figures["curve"]]
        table = wandb.Table(["share masked", "nats per masked token"], points)
        line = wandb.plot.line(table, *table.columns, title="cost by masking rate")
        run.log({"eval/cost_by_masking_rate": line})
    run.finish()


def why_offline() -> str:
    """Why W&B's server cannot be used; empty if it can."""
    import wandb

    try:
        return "" if wandb.login(prompt=False) else "no login"
    except (wandb.Error, ValueError, TypeError) as error:  # a strange address; an old `login`
        return " ".join(str(error).split())
