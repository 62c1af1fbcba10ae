"""Train a masked diffusion language model: python train.py, python train.py +experiment=medium.

To add an optimizer or a schedule, see OPTIMIZERS and SCHEDULES in nanomdm/optim.py.
"""

import copy
import math
from functools import partial

import torch
from torch import Tensor

import data
from diffusion import any_order, estimate, mask_probability, masked_diffusion_loss, sample
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, folders, optim, parallel, runlog, runs, strategies
from nanomdm.errors import as_user_error
from nanomdm.random import generator


def main(config: cli.Section) -> None:
    device = devices.pick_device(config.system.device, parallel.world().local_rank)
    with parallel.processes(device), folders.locked(config.out_dir):
        run = Run(config, device)
        config, settings = run.config, run.config.training
        step = training_step
        if run.compiled:
            step = devices.eager_if_compiling_fails(step, run.model)
        with runlog.Interrupt() as interrupt, runlog.open_log(run) as log:
            while not (run.finished or interrupt.stop):
                loss, grad_norm = step(run)
                if run.due(config.logging.interval):
                    lr = run.optimizer.param_groups[0]["lr"]
                    log.step(run.step, loss=loss, grad_norm=grad_norm, lr=lr, **run.stats.read())
                    run.stats.require_progress(runs.last_good(run))
                interrupt.agree(run.due(config.logging.interval), device)
                with log.paused():
                    if run.due(settings.eval_interval):
                        evaluate(run, log)
                    if run.due(settings.sample_interval):
                        seeded = generator(config.system.seed, "sample", run.step)
                        log.samples(run.step, [runs.sample_text(run, seeded)])
                    if run.due(settings.save_interval) and not run.stats.consecutive:
                        runs.save(run, "ckpt.pt")
            if run.saved != run.step:
                runs.save(run, "ckpt.pt")
        runs.require_saved(run)
        interrupt.exit(run.step)
        run.stats.require_result(run.step)


# --- One step ------------------------------------------------------------------------------------


def training_step(run: "Run") -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns the loss and the norm of the gradient before clipping.

    Batch and masks are functions of (seed, step, row): the same however the batch is split into
    micro-batches and over processes. Dropout is a function of (seed, step, rank): the same after a
    resume, but not for another split.
    """
    settings, seed = run.config.training, run.config.system.seed
    shape, world = run.model.config, parallel.world()
    B, parts = settings.batch_size, settings.grad_accum
    torch.manual_seed(generator(seed, "dropout", run.step).initial_seed() + world.rank)
    run.optimizer.zero_grad()
    total = torch.zeros((), device=run.device)
    for part in range(parts):
        rows = world.rows(B, part, parts)  # the rows of the batch in this micro-batch
        batch = run.train_rows.batch(B, generator(seed, "data", run.step), rows)
        x0, predict = (devices.move(tensor, run.device) for tensor in batch)
        rows = devices.move(rows, run.noise_device)
        parallel.synchronise(run.forward, part == parts - 1)
        with devices.autocast(run.device, run.dtype):
            if shape.causal:  # the autoregressive control: each token, given those before it
                costs = run.forward(x0, targets=x0, where=predict, capacity=x0.numel())
                loss = (costs.sum(dim=1) / predict.sum(dim=1)).mean()
            else:
                loss = masked_diffusion_loss(
                    run.forward,
                    x0,
                    mask_id=shape.mask_id,
                    generator=generator(seed, "masks", run.step),
                    weighting=run.config.diffusion.weighting,
                    predict=predict,
                    block_length=shape.block_length,
                    share=(rows, B),
                    nll=partial(run.forward, capacity=run.capacity),
                )
        run.scaler.scale(loss / parts).backward()
        total += loss.detach() / parts

    loss = parallel.mean(total)
    parameters = list(run.model.parameters())
    run.scaler.unscale_(run.optimizer)
    grad_norm = parallel.full_tensor(
        torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
    )
    run.optimizer.set_learning_rate(
        optim.learning_rate_factor(
            run.step, settings.max_iters, settings.warmup_iters, settings.lr_schedule
        )
    )
    skip = run.stats.add(loss, grad_norm, run.step + 1)  # 1 where one of them is not finite
    run.optimizer.step(skip)  # not scaler.step, which would skip for float16 alone
    run.scaler.update()
    optim.update_ema(list(run.ema.parameters()), parameters, settings.ema_decay, run.step)
    run.step += 1
    return loss, grad_norm


# --- Beside the steps ----------------------------------------------------------------------------


def evaluate(run: "Run", log) -> None:
    """Log the bound of the EMA weights on val and a part of train; save best.pt if val's is lowest.

    The masks are the same in every evaluation, as many as a standard error needs. All is float32:
    autocast is for training.
    """
    shape, limit, values = run.model.config, run.config.eval.tokens, {}
    exact = bounds.is_exact(shape)
    quarter = max(1, (limit or len(run.corpus.val)) // 4)
    for split, tokens in (("train", quarter), ("val", limit)):
        rows = run.eval_rows[split].evenly(tokens)
        found = estimate(
            bounds.everything if shape.causal else any_order,
            parallel.share_rows(run.ema),
            [row.ids.to(run.device) for row in rows],
            mask_id=shape.mask_id,
            predict=[row.predict for row in rows],
            block_length=shape.block_length,
            generator=generator(run.config.system.seed, "evaluation"),
            draws=1 if exact else math.ceil(bounds.LEAST_ROWS / len(rows)),
        )
        samples = bounds.NLLSamples(*found).counting([row.count for row in rows])
        for name, value in samples.summary(exact).items():
            values[f"eval/{split}_{name}"] = value
    log.metrics(run.step, values)
    on_train, on_val = (runlog.with_error(values, split) for split in ("train", "val"))
    kind = "loss" if exact else "bound"
    log.say(f"step {run.step}: {kind} {on_train} on train and {on_val} on val, nats/token")
    if (loss := values["eval/val_loss"]) < run.best:
        before, run.best = run.best, loss
        if not runs.save(run, "best.pt"):
            run.best = before  # the next bound below the saved one is saved


# --- Before the first step -----------------------------------------------------------------------


class Run:
    """A training run: a new one, one from the weights of a checkpoint, or a resumed one.

    Raises `UserError` before any file of the run is written.
    """

    def __init__(self, config: cli.Section, device: torch.device):
        config, loaded, resumes = runs.starting_point(config, Transformer, ModelConfig)
        settings, system = config.training, config.system
        state = loaded.state if resumes else {"step": 0, "best": math.inf}
        runs.check(config)
        self.config, self.device, self.step = config, device, state["step"]
        self.saved = self.step  # the step that ckpt.pt holds; 0 for none
        self.best = state["best"]  # the lowest bound on val so far, nats per token
        self.noise_device = devices.with_float64(device)
        self.dtype = devices.pick_dtype(system.dtype, device, training=True)
        with as_user_error():
            self.sampler = strategies.from_config(
                config.sampling, sample, settings.objective == "ar", config.model.block_length
            )
        with parallel.main_process_first():
            sha256 = state["corpus"]["sha256"] if resumes else ""
            self.corpus = data.load(config.data, loaded and loaded.tokenizer, sha256)
        runs.decided_by_data(config, self.corpus, loaded)

        model = runs.build_model(config, self.corpus, loaded, Transformer, ModelConfig)
        self.model = model.to(device)
        self.model.recompute = settings.activation_checkpointing
        # `build_model` loads a checkpoint's EMA weights, which `ema` copies. A resumed run then
        # goes on from the weights that the optimizer has reached.
        self.ema = copy.deepcopy(self.model).eval()
        if resumes:
            self.model.load_state_dict(state["model"])
        L = self.model.config.block_size
        tokens = (settings.max_iters - self.step) * settings.batch_size * L
        self.compiled = devices.pays_to_compile(system.compile, device, tokens)
        if self.compiled:
            devices.compile_parts(self.model)
        # What a training step calls: the model, or its copies or shards in all processes.
        self.forward = parallel.distribute(system.parallel, self.model, self.ema, self.dtype)
        self.optimizer = optim.build_optimizer(
            self.model,
            settings.optimizer,
            settings.learning_rate,
            settings.weight_decay,
            self.dtype,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.stats = optim.StepStats(device, state.get("stats", {}))
        if resumes:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
            runs.announce_schedule(settings, state)
        self.train_rows = self.corpus.rows("train", L, overlap=True)
        self.eval_rows = {split: self.corpus.rows(split, L) for split in data.SPLITS}
        runs.require_rows(self.eval_rows)
        # Room for the masked tokens of a micro-batch, so that shapes are static. Micro-batch k of n
        # has the rows k, k + n, ...: the last one has the latest times, and so the most masks.
        B, n = settings.batch_size, settings.grad_accum * parallel.world().size
        latest = torch.arange(n - 1, B, n)[:, None]
        if size := self.model.config.block_length:
            self.capacity = devices.block_capacity(len(latest) * L // size, size)
        else:
            p_mask = mask_probability((latest.double() + 0.5) / B)
            self.capacity = devices.masked_capacity(p_mask, L, B)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.training.max_iters

    def due(self, interval: int) -> bool:
        """Whether to do now what is done every `interval` steps and after the last; 0: never."""
        return interval > 0 and (self.step % interval == 0 or self.finished)


if __name__ == "__main__":
    cli.main(main)
