"""What rows of ids cost under a checkpoint: the figure that several benches compare."""

from collections.abc import Callable, Sequence

from torch import Tensor

from diffusion import any_order, estimate
from model import Transformer
from nanomdm.bounds import NLLSamples, everything, is_exact
from nanomdm.errors import as_user_error
from nanomdm.random import generator
from nanomdm.runlog import progress
from nanomdm.strategies import require_order


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
    Raises `UserError` for context behind what a network with blocks predicts.
    """
    causal, size = model.config.causal, model.config.block_length
    draws = 1 if is_exact(model.config) else draws
    with as_user_error():
        for row in predict or () if size else ():
            require_order(row[None], size)
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
            block_length=size,
            generator=generator(seed, "evaluation"),
            draws=draws,
            batch_size=batch_size,
        )
    return NLLSamples(*found)
