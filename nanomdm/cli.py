"""The command line: words `key=value` become a checked configuration, composed by Hydra."""

import difflib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError, optional, visible

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RANK = int(os.environ.get("RANK", 0))  # of this process among those of torchrun
FREE = "sampling.options"  # a dictionary with keys of a strategy's own
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list like [a,b]",
    dict: "a section like {a: 1}",
}
RANGES = {  # what a number must be: the condition, and the keys that it holds for
    "at least 1": (lambda x: x >= 1, ("num_samples", "sampling.steps", "eval.draws")),
    "positive": (
        lambda x: x > 0,
        (
            "training.max_iters",
            "training.batch_size",
            "training.grad_accum",
            "training.learning_rate",
            "logging.interval",
        ),
    ),
    "0 or more": (
        lambda x: 0 <= x < math.inf,
        (
            "training.warmup_iters",
            "training.weight_decay",
            "training.grad_clip",
            "training.eval_interval",
            "training.sample_interval",
            "training.save_interval",
            "sampling.temperature",
            "sampling.length",
            "sampling.options.top_k",
            "sampling.options.guidance",
            "sampling.options.block_length",
            "sampling.options.gamma",
            "eval.tokens",
        ),
    ),
    "0 or more and less than 1": (lambda x: 0 <= x < 1, ("training.ema_decay",)),
    "in (0, 1]": (lambda x: 0 < x <= 1, ("sampling.top_p",)),
    "in [0, 1]": (
        lambda x: 0 <= x <= 1,
        ("diffusion.weighting", "sampling.options.threshold", "sampling.options.remask_rate"),
    ),
}
CHOICES = {  # keys that name one of some things: in a sweep, their values may be listed
    "training.objective": ("diffusion", "ar"),
    "training.resume": ("auto", "true", "false"),
    "system.dtype": ("auto", "float32", "bfloat16", "float16"),
    "system.compile": ("auto", "true", "false"),
    "system.parallel": ("auto", "ddp", "fsdp"),
    "experiment": (),  # the things are listed elsewhere
    "data.dataset": (),
    "data.tokenizer": (),
    "training.lr_schedule": (),
    "training.optimizer": (),
    "sampling.strategy": (),
    "system.device": (),
}
# Keys, or their beginnings, that a resumed run does not change; and those that a command has to
# repeat where it starts and resumes a run alike.
FIXED = ("model.", "data.tokenizer", "data.vocab_size", "training.optimizer", "training.objective")
REPEATED = (
    "diffusion.weighting",
    "training.batch_size",
    "training.learning_rate",
    "training.lr_schedule",
    "training.warmup_iters",
    "training.objective",
    "training.optimizer",
    "training.weight_decay",
    "training.grad_clip",
    "training.ema_decay",
    "system.seed",
)
RENAMED = {  # by its old name: the key, and the default that it had
    "sampling.output": ("output", ""),
    "eval.output": ("output", ""),
    "training.eval_tokens": ("eval.tokens", 0),
    "sampling.threshold": ("sampling.options.threshold", 0.9),
    "sampling.gamma": ("sampling.options.gamma", 0.1),
    "sampling.remask_rate": ("sampling.options.remask_rate", 0.05),
    "sampling.top_k": ("sampling.options.top_k", 0),
    "sampling.guidance": ("sampling.options.guidance", 0.0),
    "sampling.block_length": ("sampling.options.block_length", 0),
}
RETIRED = {  # the value that each has now
    "model.tie_weights": True,
    "model.qk_norm": True,
    "model.mlp_size": 0,
    "model.norm_eps": 1e-5,
    "model.rope_base": 10000.0,
    "diffusion.eps": 1e-3,
    "diffusion.masking": "bernoulli",
    "data.cache_dir": "that of the environment variable NANOMDM_CACHE",
    "training.min_lr_ratio": 0.0,
    "training.max_skipped": 50,
    "training.keep": 0,
    "sampling.remask_unsure": False,
    "sampling.batch_size": 64,
    "eval.batch_size": 64,
    "eval.plot": "",
    "eval.stride": 0,
    "system.timeout": 30.0,
}
DECIDED = ("model.", "data.tokenizer", "data.vocab_size")  # by a checkpoint
DECISIVE = ("diffusion.eps", "diffusion.masking", "training.min_lr_ratio")  # of a resumed run


class Section(SimpleNamespace):
    """The configuration, or a section of it: plain values as attributes."""

    explicit = frozenset()  # of the whole configuration: the keys that the command line names

    def as_dict(self) -> dict:
        return {
            name: value.as_dict() if isinstance(value, Section) else value
            for name, value in vars(self).items()
            if name != "explicit"
        }


def section(values: dict) -> Section:
    """The values of {"a": {"b": 1}}, or of {"a.b": 1}, as attributes: `.a.b`."""
    result = Section()
    for key, value in flat(values).items():
        part, _, name = key.rpartition(".")
        setattr(vars(result).setdefault(part, Section()) if part else result, name, value)
    return result


def flat(values, prefix=""):
    """{"a": {"b": 1}} as {"a.b": 1}; `options` are one value."""
    result = {}
    for name, value in values.items():
        inside = isinstance(value, dict) and not name.endswith("options")
        result |= flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return result


def find(values, key, default=None):
    """The value of a dotted key in nested dictionaries."""
    for name in key.split("."):
        values = values.get(name, default) if isinstance(values, dict) else default
    return values


def main(script: Callable, name: str = "config", reads: Sequence[str] = ()) -> None:
    """Run `script(config)`; with -m, once for each combination of the values that are listed.

    configs/NAME.yaml holds the settings: a tool or a bench has its own. `reads` are the keys that
    the script reads, or their beginnings, if it does not read all of them.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    with one_line_errors():
        for config in jobs(sys.argv[1:], name, reads):
            script(config)


@contextmanager
def one_line_errors():
    """End what is no bug in one line on stderr; a bug keeps its traceback.

    The exit code is 2 for a mistake of the user's, 1 for what fails at run time (`OSError`, and
    `FloatingPointError` for training that diverged), 130 for Ctrl-C.
    """
    try:
        return (yield)
    except OverrideParseException as error:
        message, code = f"cannot read {error.override}: {error}", 2
    except (UserError, HydraException, OmegaConfBaseException) as error:
        message, code = str(error), 2
    except (OSError, FloatingPointError) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    if code == 2 and RANK:
        time.sleep(10)  # all processes found the same mistake: the first one says it
    line = visible(" ".join(message.split()))  # a damaged file may be quoted in it
    print("error:", re.sub("(.{500}).+(.{500})", r"\1 ... \2", line), file=sys.stderr)
    sys.exit(code)


def jobs(words, name="config", reads=()):
    """Yield the configuration that the words describe; in a sweep, that of each job."""
    options = {word for word in words if word.startswith("-")}
    if options & {"-h", "--help"}:
        print((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        return
    if unknown := options - ({"-m", "--multirun"} if name == "config" else set()):
        raise UserError(f"no option {min(unknown)} here: a setting is key=value, without dashes")
    defaults = flat(load_defaults(name))
    choices = read([word for word in words if word not in options], defaults, options)
    for key, _ in itertools.chain(*choices):
        if reads and key.startswith(DECIDED) and not key.startswith(reads):
            raise UserError(f"{key}: the checkpoint decides it: leave it out")
    for number, settings in enumerate(itertools.product(*choices)):
        config = configure(settings, name, defaults)
        if options:
            config.out_dir = str(Path(config.out_dir, str(number)))
        for key, _ in settings if reads and not (number or RANK) else ():
            if not key.startswith((*reads, "experiment")):
                print(f"{key} has no effect on {Path(sys.argv[0]).name}", file=sys.stderr)
        yield config


def compose(words: Sequence[str], experiment: str = "") -> Section:
    """The configuration of train.py with these words and an experiment. Raises `UserError`."""
    return next(jobs([*words, f"experiment={experiment}"] if experiment else words))


# --- Words --------------------------------------------------------------------------------------


def read(words, defaults, sweep):
    """The pairs (key, value) that each word stands for, as Hydra reads them: several in a sweep.

    Words without an equals sign are the items of a tool's first setting, if that is a list:
    `python -m tools.plot out out-ar` means `runs=[out,out-ar]`.
    """
    first, items, pairs = next(iter(defaults)), [], []
    for word in words:
        key, equals, text = word.lstrip("+").partition("=")
        key, _ = RENAMED.get(key, (key, None))
        if isinstance(defaults[first], list) and (not equals or "/" in key):  # no key has a slash
            items.append(verbatim(word))
        elif not equals:
            raise UserError(f"{word!r} is no setting: write key=value, as in model.n_layer=6")
        elif key in RETIRED:
            raise UserError(f"{key} is no longer a setting (now {RETIRED[key]!r}): leave it out")
        else:
            values = values_of(key, text, defaults.get(key), sweep)
            pairs.append([(key, value) for value in values])
    return [*pairs, [(first, f"[{','.join(items)}]")]] if items else pairs


def values_of(key, text, default, sweep):
    """Texts, and lists of them, are taken as they are; other values have Hydra's syntax."""
    is_text = isinstance(default, str) and not (sweep and key in CHOICES)
    if is_text or isinstance(default, list) and not text.startswith("["):
        return [verbatim(text)]
    if isinstance(default, list) and re.fullmatch(r"""\[[^]["']+]""", text):
        return [f"[{','.join(verbatim(item.strip()) for item in text[1:-1].split(','))}]"]
    if sweep:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if override.is_sweep_override():
            return override.sweep_string_iterator()
    return [text]


def verbatim(text):
    """An interpolation that stands for the text, without a character that is special to Hydra."""
    try:
        return f"${{text:x{text.encode().hex()}}}"
    except UnicodeEncodeError:
        raise UserError("an argument is not valid UTF-8: check the terminal's encoding") from None


OmegaConf.register_new_resolver("text", lambda code: bytes.fromhex(code[1:]).decode(), replace=True)

# --- Values -------------------------------------------------------------------------------------


def configure(settings, name, defaults):
    """configs/NAME.yaml with the experiments and settings laid over it by Hydra, checked."""
    explicit, overrides = set(), []
    for key, value in settings:
        if key == "experiment" and key not in defaults:
            overrides.append(f"+experiment@_global_={value}")
            explicit |= experiment(value)
        else:
            overrides.append(f"++{key}={value}")
            explicit.add(FREE if key.startswith(f"{FREE}.") else key)
    for key in sorted(explicit - defaults.keys()):
        related = [k for k in defaults if k.endswith(f".{key}") or k.startswith(f"{key}.")]
        nearest = related or difflib.get_close_matches(key, defaults, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"configs/{name}.yaml lists them all"
        raise UserError(f"no setting {key}: {hint}")
    path = CONFIGS / f"{name}.yaml"
    with hydra.initialize_config_dir(str(path.parent), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(path.stem, overrides), resolve=True)
    config = checked({key: find(composed, key) for key in defaults}, defaults)
    config.explicit = explicit
    return config


def checked(values, defaults):
    """The values as attributes, if they are what they must be. Raises `UserError`."""
    values = {key: typed(key, values[key], default) for key, default in defaults.items()}
    config = section(values)
    for wanted, (holds, keys) in RANGES.items():
        for key in keys:
            value = find(config.as_dict(), key)
            if value is not None and not (isinstance(value, int | float) and holds(value)):
                raise UserError(f"{key}={value} must be {wanted}")
    for key, names in CHOICES.items():
        if names and values.get(key, names[0]) not in names:
            raise UserError(f"{key}={values[key]} is unknown: choose one of {', '.join(names)}")
    if values.get("data.path") and values.get("data.dir"):
        raise UserError("data.path and data.dir are both given: leave one of them empty")
    if values.get("logging.wandb"):
        optional("wandb", "logging.wandb=true")
    return config


def typed(key, value, default):
    """The value as the type of the default. Raises `UserError` where that would change it."""
    kind, given = type(default), type(value)
    if kind is str and given in (bool, int, float):  # compile: true in a file
        value = str(value).lower()
    elif kind is list is given:
        value = [str(item) for item in value]
    elif (kind, given) == (float, int) or (kind, given) == (int, float) and value.is_integer():
        value = kind(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{key}={value} is not {KINDS[kind]}: its default is {default!r}")
    return value


def experiment(value):
    """The keys that the experiments NAME or [NAME,NAME] set. Raises `UserError`."""
    known, keys = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")), set()
    for name in value.strip("[]").split(","):
        if name not in known:
            raise UserError(f"experiment={name} is unknown: choose one of {', '.join(known)}")
        keys |= flat(load_defaults(f"experiment/{name}")).keys()
    return keys


def load_defaults(name: str = "config") -> dict:
    """The settings in configs/NAME.yaml, interpolations and all. Raises `UserError`."""
    path = CONFIGS / f"{name}.yaml"
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(path.read_bytes())):
            raise ValueError("an alias, which could repeat its anchor a billion times")
        return dict(OmegaConf.to_container(OmegaConf.load(path)))
    except Exception as error:  # of YAML, of its encoding or of OmegaConf
        raise UserError(f"{path} is damaged ({error}): restore it") from error


# --- Resuming -----------------------------------------------------------------------------------


def resumed(stored: dict, config: Section, whole: bool) -> Section:
    """An interrupted run's configuration, but for `out_dir` and the explicit keys of `config`.

    Raises `UserError` where one of them would make it another run; with `whole`, also where a
    setting that is not among them differs.
    """
    defaults, now = flat(load_defaults()), flat(config.as_dict())
    for key in DECISIVE:
        value = typed(key, find(stored, key, RETIRED[key]), RETIRED[key])
        if value != RETIRED[key]:
            raise UserError(
                f"the interrupted run has {key}={value}, which is no longer a setting: finish it "
                "with the version that began it"
            )
    if config.training.init_from and not whole:
        raise UserError(
            "training.init_from starts a run, training.resume=true continues one: choose"
        )
    before = {
        key: typed(key, find(stored, key, now[key]), default) for key, default in defaults.items()
    }
    for old, (key, default) in RENAMED.items():
        if key in defaults:
            before[key] = find(stored, old, before[key])
        elif (value := typed(old, find(stored, old, default), default)) != default:
            before[FREE] = before[FREE] | {key.removeprefix(f"{FREE}."): value}
    repeated = REPEATED if whole else ()
    for key in config.explicit.union(repeated, ["out_dir"]):
        if key.startswith((*FIXED, *repeated)) and before[key] != now[key]:
            raise UserError(
                f"{key}={now[key]} is not what the interrupted run had ({before[key]}): leave it "
                "out (or its experiment) or give it as it was, or start a new run in another "
                "out_dir"
            )
        before[key] = now[key]
    result = checked(before, defaults)
    result.explicit = config.explicit
    return result
