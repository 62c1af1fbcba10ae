"""What rows of ids cost under a checkpoint: the figure that several benches compare."""

from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion import any_order, estimate
from model import Transformer
from nanomdm.bounds import NLLSamples, everything
from nanomdm.random import generator
from nanomdm.runlog import progress


def nll_samples(
    model: Transformer,
    rows: Sequence[Tensor],
    *,
    seed: int,
    draws: int,
    predict: Sequence[Tensor] | None = None,
    batch_size: int = 64,
    estimator: Callable = any_order,
) -> NLLSamples:
    """Monte Carlo samples of the bound of rows (L_i,), on masks that follow from `seed` alone.

    `predict` as in `diffusion.estimate`. An autoregressive network is scored exactly, in one draw.
    """
    causal = model.config.causal
    draws = 1 if causal else draws
    with progress(draws * sum(map(len, rows)), "token") as advance:

        def nll(xt: Tensor, targets: Tensor, where: Tensor) -> Tensor:
            advance(xt.numel())
            return model(xt, targets, where)

        found = estimate(
            everything if causal else estimator,
            nll,
            [row.to(model.device) for row in rows],
            mask_id=model.config.mask_id,
            predict=predict,
            generator=generator(seed, "evaluation"),
            draws=draws,
            batch_size=batch_size,
        )
    return NLLSamples(*found)
