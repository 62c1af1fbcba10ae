"""Evaluates a checkpoint with EleutherAI's lm-evaluation-harness.

python -m tools.lm_eval checkpoint=out/best.pt tasks=[lambada_openai]

`loglikelihood` is minus the conditional bound of the continuation given its context. It is greedy
if the most probable tokens, filled in by decreasing confidence, give the continuation.
`loglikelihood_rolling` is minus the bound of the whole text. `generate_until` fills a canvas after
the prompt. Minus the bound is a lower bound on the log-likelihood, so no score is too high. An
autoregressive checkpoint is scored exactly.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.cloze import Fill, as_texts, costs, greedy_fills
from diffusion import sample
from model import ModelConfig, Transformer
from nanomdm import cli, devices, strategies
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, as_user_error, check_choice
from nanomdm.random import generator


def make_adapter(loaded: Loaded, config: Section):
    """The model with the interface of the harness."""
    from lm_eval.api.model import LM

    class NanoMDM(LM):
        def loglikelihood(self, requests) -> list[tuple[float, bool]]:
            fills = [Fill(*request.args) for request in requests]
            texts, nats = score(loaded, fills, config)
            return list(zip(nats, greedy_fills(loaded, texts, config.batch_size), strict=True))

        def loglikelihood_rolling(self, requests) -> list[float]:
            fills = [Fill("", request.args[0]) for request in requests]
            return score(loaded, fills, config)[1]

        def generate_until(self, requests) -> list[str]:
            return [generate(loaded, *request.args, config) for request in requests]

    return NanoMDM()


def score(loaded: Loaded, fills: list[Fill], config: Section):
    """The rows of the fills, and minus the cost of each fill in nats."""
    texts = as_texts(fills, loaded.tokenizer, loaded.model.config.block_size)
    nats = costs(loaded, texts, seed=config.seed, draws=config.draws, batch_size=config.batch_size)
    return texts, (-nats.mean(dim=0)).tolist()


def generate(loaded: Loaded, prompt: str, wanted: dict, config: Section) -> str:
    """A continuation of the prompt, cut before the first stop text.

    The canvas has `max_gen_toks` tokens, at most half of the context. The rest of the context holds
    the end of the prompt.
    """
    model, context = loaded.model, loaded.model.config.block_size
    length = min(int(wanted.get("max_gen_toks", context)), max(1, context // 2))
    known = torch.from_numpy(loaded.tokenizer.encode(prompt)[-(context - length) :])
    canvas = F.pad(known, (0, length))[None]  # (1, L)
    is_masked = torch.arange(canvas.size(1))[None] >= len(known)
    sampling = {"strategy": config.strategy, "steps": config.steps, "options": {}}
    sampling["temperature"] = float(wanted.get("temperature", 0.0))
    with as_user_error():
        shape = model.config
        sampler = strategies.from_config(
            Section(**sampling), sample, shape.causal, shape.block_length
        )
        filled = sampler.fill(model, canvas, is_masked, generator=generator(config.seed, "sample"))
    text = loaded.tokenizer.decode(filled.ids[0, len(known) :].tolist())
    stops = wanted.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text


def main(config: Section) -> None:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UserError("the harness needs a package: pip install lm_eval") from None
    if not config.tasks:
        raise UserError("no tasks: name some, as in tasks=[lambada_openai]")
    check_choice("strategy", config.strategy, strategies.STRATEGIES)
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    if loaded.layout == "pairs":
        raise UserError(f"{config.checkpoint} answers prompts, and knows no texts: name another")
    results = lm_eval.simple_evaluate(
        model=make_adapter(loaded, config),
        tasks=config.tasks,
        task_manager=TaskManager(include_path=config.include_path or None),
        num_fewshot=None if config.num_fewshot < 0 else config.num_fewshot,
        limit=config.limit or None,
        random_seed=config.seed,
    )
    print(make_table(results))
    if config.output:
        kept = {key: results[key] for key in ("results", "versions", "n-samples") if key in results}
        Path(config.output).write_text(json.dumps(kept, indent=1, default=str) + "\n")


if __name__ == "__main__":
    cli.main(main, "tools/lm_eval")
