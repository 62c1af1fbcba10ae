"""The command line: words `key=value` become a checked configuration, composed by Hydra."""

import difflib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from operator import not_
from pathlib import Path
from types import SimpleNamespace

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .devices import considerate_threads, keep_freed_memory
from .errors import UserError, as_user_error, check_choice, optional, visible
from .folders import ROOT, numbered
from .runlog import ranking
from .strategies import STRATEGIES, is_adaptive, options_of

CONFIGS = ROOT / "configs"
RANK = int(os.environ.get("RANK", 0))  # of this process among those of torchrun
FREE = "sampling.options"  # a dictionary with keys of a strategy's own
NO_MEMORY = re.compile("(allocate|out of|enough) memory|Unable to allocate")  # of torch and numpy
RANGES = {  # what a number must be: the condition, and the keys that it holds for
    "positive": (
        lambda x: 0 < x < math.inf,
        (
            "num_samples",
            "training.max_iters",
            "training.batch_size",
            "training.grad_accum",
            "training.learning_rate",
            "sampling.steps",
            "eval.draws",
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
            "sampling.options.block_length",
            "sampling.options.gamma",
            "eval.tokens",
        ),
    ),
    "0 or more and less than 1": (lambda x: 0 <= x < 1, ("training.ema_decay",)),
    "in (0, 1]": (lambda x: 0 < x <= 1, ("sampling.options.top_p",)),
    "in [0, 100]": (lambda x: 0 <= x <= 100, ("sampling.options.guidance",)),
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
# Keys, or their beginnings, that a checkpoint decides; that a resumed run does not change; and that
# a command has to repeat where it starts and resumes a run alike.
DECIDED = ("model.", "data.tokenizer", "data.vocab_size")
FIXED = (*DECIDED, "training.optimizer", "training.objective")
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
# The settings, or sections of them, that each script reads: others have no effect on it.
READS = {
    "train.py": (
        "out_dir",
        "model",
        "diffusion",
        "data",
        "training",
        "sampling.strategy",
        "sampling.steps",
        "sampling.temperature",
        "sampling.options",
        "eval.tokens",
        "system",
        "logging",
    ),
    "sample.py": (
        "checkpoint",
        "prompt",
        "blank",
        "num_samples",
        "output",
        "sampling",
        "system.device",
        "system.dtype",
        "system.compile",
        "system.seed",
    ),
    "eval.py": (
        "checkpoint",
        "output",
        "out_dir",
        "data.path",
        "data.dir",
        "data.dataset",
        "sampling.steps",
        "sampling.temperature",
        "sampling.options",
        "eval",
        "system.device",
        "system.dtype",
        "system.compile",
        "system.seed",
        "logging",
    ),
}
MASKED = ("diffusion.weighting", "sampling.strategy", "sampling.steps")  # not if autoregressive
# Settings that have no effect because of others, which the same script reads: the beginnings of
# their keys, and what holds for the values of the others then.
IDLE = (
    ("data.vocab_size", {"data.dir": bool, "data.tokenizer": lambda name: name != "ids"}),
    ("data.vocab_size", {"data.tokenizer": ("char", "byte", "gpt2").__contains__}),
    ("blank", {"prompt": not_, "prompt_file": not_}),
    ("data.dataset", {"data.path": bool}),
    ("data.dataset", {"data.dir": bool}),
    (MASKED, {"training.objective": "ar".__eq__}),
    (MASKED, {"model.block_length": (1).__eq__}),
    ("eval.tokens", {"training.eval_interval": not_}),
    ("sampling.", {"training.sample_interval": not_}),
    ("sampling.steps", {"sampling.strategy": is_adaptive}),
    ("sampling.options.top_", {"sampling.temperature": not_}),
    ("sampling.options.block_length", {"model.block_length": bool}),
    ("sampling.options.guidance", {"prompt": not_, "prompt_file": not_}),
    (("sampling.temperature", "sampling.options"), {"eval.samplers": not_}),
    (
        "sampling.steps",
        {
            "eval.samplers": lambda names: all(map(is_adaptive, names)),
            "eval.bounds": lambda names: "discrete" not in names,
        },
    ),
    (("logging.name", "logging.project", "logging.tags"), {"logging.wandb": not_}),
)
# Options of a strategy, with their defaults, which may be written without `.options`; and what a
# run of an earlier version may have stored: a setting of another name, and settings that are gone.
OPTIONS = {name: value for each in STRATEGIES for name, value in options_of(each).items()}
RENAMED = {"training.eval_tokens": "eval.tokens"}
RENAMED |= {f"sampling.{name}": f"{FREE}.{name}" for name in OPTIONS}
GONE = {
    "diffusion.eps": 1e-3,
    "diffusion.masking": "bernoulli",
    "training.min_lr_ratio": 0.0,
    "eval.curve": False,
}


class Section(SimpleNamespace):
    """The configuration, or a section of it: plain values as attributes."""

    explicit = frozenset()  # of the whole configuration: the keys that the command line names
    job = ""  # of the whole configuration, in a sweep: the settings that differ from job to job

    def as_dict(self) -> dict:
        return {
            name: value.as_dict() if isinstance(value, Section) else value
            for name, value in vars(self).items()
            if name not in ("explicit", "job")
        }


def section(values: dict) -> Section:
    """The values of {"a": {"b": 1}}, or of {"a.b": 1}, as attributes: `.a.b`."""
    result = Section()
    for key, value in flat(values).items():
        part, _, name = key.rpartition(".")
        setattr(vars(result).setdefault(part, Section()) if part else result, name, value)
    return result


def flat(values, prefix=""):
    """{"a": {"b": 1}} as {"a.b": 1}. Sections have no sections: a dict in one is a value."""
    result = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = isinstance(value, dict) and "." not in key
        result |= flat(value, f"{key}.") if is_section else {key: value}
    return result


def main(script: Callable, name: str = "config") -> None:
    """Run `script(config)`; with -m, once for each combination of the values that are listed.

    configs/NAME.yaml holds the settings: a tool or a bench has its own.

    What is no bug ends in one line on stderr; a bug keeps its traceback. The exit code is 2 for a
    mistake of the user's, 1 for what fails at run time (`OSError`, a lack of memory, and
    `FloatingPointError` for training that diverged, after which a sweep goes on), 130 for Ctrl-C.
    """
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    swept, code = {}, 0
    keep_freed_memory()
    try:
        for config in jobs(sys.argv[1:], name, script):
            failed = ""
            try:
                with considerate_threads():
                    script(config)
            except FloatingPointError as error:
                code, failed = complain(error, 1), " (failed)"
            if config.job:
                swept[config.out_dir] = config.job + failed
        for line in () if RANK else ranking(swept):
            print(line)
    except OverrideParseException as error:
        code = complain(f"cannot read {error.override}: {error}", 2)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        code = complain(error, 2)
    except OSError as error:
        code = complain(error, 1)
    except (MemoryError, RuntimeError) as error:
        if not NO_MEMORY.search(str(error)):
            raise
        code = complain(f"not enough memory, take a smaller model, batch or text: {error}", 1)
    except KeyboardInterrupt:
        code = complain("interrupted", 130)
    if code:
        sys.exit(code)


def complain(message: object, code: int) -> int:
    """Print an error in one line; returns the exit code."""
    if code == 2 and RANK:
        time.sleep(10)  # all processes found the same mistake: the first one says it
    line = visible(" ".join(str(message).split()))  # a damaged file may be quoted in it
    print("error:", re.sub("(.{500}).+(.{500})", r"\1 ... \2", line), file=sys.stderr)
    return code


def jobs(words, name="config", script=None):
    """Yield the configuration that the words describe; in a sweep, that of each job."""
    options = {word for word in words if word.startswith("-")}
    if options & {"-h", "--help"}:
        print((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        return
    if unknown := options - ({"-m", "--multirun"} if name == "config" else set()):
        raise UserError(f"no option {min(unknown)} here: a setting is key=value, without dashes")
    defaults = flat(load_defaults(name))
    choices = read([word for word in words if word not in options], defaults, options)
    named = Path(sys.argv[0]).name
    if named not in READS:  # a script of the user's own that calls one of ours
        named = f"{getattr(script, '__module__', '')}.py"
    reads = name == "config" and READS.get(named) or tuple(defaults)
    said = {""}
    for key, _ in itertools.chain(*choices):
        if key.startswith(DECIDED) and not key.startswith(reads):
            raise UserError(f"{key}: the checkpoint decides it: leave it out")
    found = [  # all are checked before the first begins
        (settings, configure(settings, name, defaults, options))
        for settings in itertools.product(*choices)
    ]
    for number, (settings, config) in enumerate(found):
        if options:
            config.out_dir = str(Path(config.out_dir, str(number)))
            if config.output:
                config.output = str(numbered(Path(config.output), number))
        if options and "training" in reads:
            swept = (setting for setting in settings if [setting] not in choices)
            config.job = " ".join("=".join(setting) for setting in swept)
        named_options = [(key, "") for key in config.explicit if key.startswith(f"{FREE}.")]
        for key, value in () if RANK else dict([*named_options, *settings]).items():
            why = without_effect(key, value, config, reads, named)
            if (line := why and f"{key} has no effect {why}") not in said:
                said.add(line)
                print(line, file=sys.stderr)
        yield config


def without_effect(key, value, config, reads, script):
    """Why a setting of the command line has no effect, in words; "" if it has one."""
    keys = experiment(value) if key == "experiment" else {key}
    if not any(k.startswith(reads) for k in keys):
        return f"on {script}"
    values = flat(config.as_dict())
    for idle, others in IDLE:
        known = all(other in values and other.startswith(reads) for other in others)
        if key.startswith(idle) and known and all(f(values[k]) for k, f in others.items()):
            return "with " + " and ".join(f"{other}={values[other]}" for other in others)
    return ""


def ignored(config: Section, keys: set[str], why: str) -> None:
    """Print that explicit settings have no effect, where that shows only in a checkpoint."""
    for key in sorted(config.explicit & keys):
        print(f"{key} has no effect: {why}", file=sys.stderr)


def decided_by_shape(config: Section, shape) -> None:
    """Print which explicit settings of sampling have no effect on a network of this shape."""
    if shape.causal or shape.block_length == 1:
        keys = {"sampling.strategy", "sampling.steps"}
        ignored(config, keys, f"{config.checkpoint} is autoregressive")
    if shape.block_length:
        own = f"{config.checkpoint} has blocks of its own, of {shape.block_length} tokens"
        ignored(config, {f"{FREE}.block_length"}, own)


def compose(words: Sequence[str], experiment: str = "") -> Section:
    """The configuration of train.py with these words and an experiment. Raises `UserError`."""
    return next(jobs([*words, f"experiment={experiment}"] if experiment else words))


# --- Words --------------------------------------------------------------------------------------


def read(words, defaults, sweep):
    """The pairs (key, value) that each word stands for.

    Texts, and lists of texts, are taken as they are; other values have Hydra's syntax, in which a
    word of a sweep may list several. Words without an equals sign are the items of a tool's first
    setting, if that is a list: `python -m tools.plot out out-ar` means `runs=[out,out-ar]`.
    """
    first, items, choices = next(iter(defaults)), [], []
    for word in words:
        with as_user_error("an argument is not valid UTF-8, check the terminal's encoding: "):
            word.encode()
        key, equals, text = word.lstrip("+").partition("=")
        if isinstance(defaults[first], list) and (not equals or "/" in key):  # no key has a slash
            items.append(word)
            continue
        if not equals:
            raise UserError(f"{word!r} is no setting: write key=value, as in model.n_layer=6")
        key = RENAMED.get(key, key)
        default, values = defaults.get(key), [text]
        if isinstance(default, list) and re.fullmatch(r"""\[[^]["']+]""", text):
            values = [[item.strip() for item in text[1:-1].split(",") if item.strip()]]
        elif sweep and (key in CHOICES or not isinstance(default, str)):
            override = OverridesParser.create().parse_override(f"{key}={text}")
            values = override.sweep_string_iterator() if override.is_sweep_override() else values
        choices.append([(key, value) for value in values])
        if not choices[-1]:
            raise UserError(f"{word} is a sweep over nothing: list its values, as in {key}=1,2")
    return [*choices, [(first, items)]] if items else choices


# --- Values -------------------------------------------------------------------------------------


def configure(settings, name, defaults, sweep):
    """configs/NAME.yaml with the experiments and settings laid over it by Hydra, checked."""
    explicit, overrides, texts = set(), [], {}
    for key, value in settings:
        if key == "experiment" and key not in defaults:
            overrides.append(f"+experiment@_global_={value}")
            explicit |= experiment(value)
            continue
        explicit.add(FREE if key.startswith(f"{FREE}.") else key)
        texts.pop(key, None)  # of an earlier word: the last one counts
        default = defaults.get(key)
        is_text = isinstance(default, str) and not (sweep and key in CHOICES)
        if is_text or isinstance(default, list) and value[:1] not in ("[", "$"):
            texts[key] = value  # a text, a list of texts, or no list: `checked` refuses it
        else:
            overrides.append(f"++{key}={value}")
    for key in sorted(explicit - defaults.keys()):
        near = nearest(key, [*defaults, *(RENAMED if name == "config" else ())])
        hint = f"did you mean {near}?" if near else f"configs/{name}.yaml lists them all"
        raise UserError(f"no setting {key}: {hint}")
    path = CONFIGS / f"{name}.yaml"
    with as_user_error(), hydra.initialize_config_dir(str(path.parent), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(path.stem, overrides), resolve=True)
    config = checked(flat(composed) | texts, defaults)
    options = config.sampling.options if FREE in explicit else ()
    config.explicit = explicit | {f"{FREE}.{name}" for name in options}
    return config


def nearest(key, keys):
    """The known key that somebody may have meant who wrote `key`, or ""."""
    word = key.rpartition(".")[2]
    names = {k: k.rpartition(".")[2] for k in keys}
    near = difflib.get_close_matches(word, names.values(), n=1, cutoff=0.75)
    found = [k for k, name in names.items() if name == word or k.startswith(f"{key}.")]
    found += [k for k, name in names.items() if word == "".join(w[0] for w in name.split("_"))]
    found += [k for k, name in names.items() if word in name.split("_") or name.startswith(word)]
    found += [k for k, name in names.items() if name in near]
    found += difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    return found[0] if found else ""


def checked(values, defaults):
    """The values as attributes, if they are what they must be. Raises `UserError`."""
    values = {key: typed(key, values.get(key), default) for key, default in defaults.items()}
    numbers = values | flat(values.get(FREE, {}), f"{FREE}.")
    for key, value in numbers.items():
        if type(value) is int and abs(value) >= 2**63 and not key.endswith("seed"):
            raise UserError(f"{key}={value} is too large: it must be below 2^63")
        for wanted, (holds, keys) in RANGES.items():
            if key in keys and not (isinstance(value, int | float) and holds(value)):
                raise UserError(f"{key}={value} must be {wanted}")
    for key, names in CHOICES.items():
        if names and key in values:
            check_choice(key, values[key], names)
    if values.get("data.path") and values.get("data.dir"):
        raise UserError("data.path and data.dir are both given: leave one of them empty")
    if output := values.get("output"):
        if Path(output).is_dir():
            raise UserError(f"output={output} is a folder: name a file")
        for key in ("checkpoint", "eval.against", "data.path", "prompt_file"):
            if values.get(key) and Path(values[key]).resolve() == Path(output).resolve():
                raise UserError(f"output={output} and {key} are one file: name another")
    if values.get("logging.wandb"):
        optional("wandb", "logging.wandb=true")
    return section(values)


def typed(key, value, default):
    """The value as the type of the default. Raises `UserError` where that would change it."""
    kind, given = type(default), type(value)
    if kind is str and given in (bool, int, float):  # compile: true in a file
        value = str(value).lower()
    elif kind is list is given:
        value = [str(item) for item in value]
    elif kind in (int, float) and given in (int, float) and value % 1 == 0:  # 1e3 steps, dropout 0
        value = kind(value)
    if type(value) is not kind:
        like = f"[{value}]" if kind is list else repr(default)
        raise UserError(f"{key}={value} is not of type {kind.__name__}, like {like}")
    return value


def experiment(value):
    """The keys that the experiments NAME or [NAME,NAME] set. Raises `UserError`."""
    known, keys = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")), set()
    for name in value.strip("[]").split(","):
        check_choice("experiment", name, known)
        keys |= flat(load_defaults(f"experiment/{name}")).keys()
    return keys


def load_defaults(name: str = "config") -> dict:
    """The settings in configs/NAME.yaml, interpolations and all. Raises `UserError`."""
    path = CONFIGS / f"{name}.yaml"
    try:
        if yaml.AliasToken in map(type, yaml.scan(path.read_bytes())):
            raise ValueError("an alias, which could repeat its anchor a billion times")
        return dict(OmegaConf.to_container(OmegaConf.load(path)))
    except Exception as error:  # of YAML, of its encoding or of OmegaConf
        raise UserError(f"{path} is damaged ({error}): restore it") from error


# --- Settings of a checkpoint -------------------------------------------------------------------


def stored_data(settings: dict, name: str = "the checkpoint") -> Section:
    """The section `data` of a checkpoint's settings; what it lacks has its default.

    Raises `UserError` with the checkpoint's name.
    """
    defaults = flat(load_defaults())
    with as_user_error(f"{name}: "):
        return checked(defaults | flat({"data": settings.get("data", {})}), defaults).data


def resumed(stored: dict, config: Section, whole: bool) -> Section:
    """An interrupted run's configuration, but for `out_dir` and the explicit keys of `config`.

    Raises `UserError` where one of them would make it another run; with `whole`, also where a
    setting that is not among them differs.
    """
    if config.training.init_from and not whole:
        raise UserError(
            "training.init_from starts a run, training.resume=true continues one: choose"
        )
    defaults, now, before = flat(load_defaults()), flat(config.as_dict()), flat(stored)
    for key, today in GONE.items():
        if (value := typed(key, before.get(key, today), today)) != today:
            raise UserError(
                f"the interrupted run has {key}={value}, which is no longer a setting: finish it "
                "with the version that began it"
            )
    before |= {key: before[old] for old, key in RENAMED.items() if old in before}
    values = {key: typed(key, before.get(key, now[key]), defaults[key]) for key in defaults}
    for name, default in OPTIONS.items():
        value = typed(name, before.get(f"sampling.{name}", default), default)
        if value != default:
            values[FREE] = values[FREE] | {name: value}
    repeated = REPEATED if whole else ()
    for key in defaults.keys() & config.explicit.union(repeated, ["out_dir"]):
        if key.startswith((*FIXED, *repeated)) and values[key] != now[key]:
            raise UserError(
                f"{key}={now[key]} is not what the interrupted run had ({values[key]}): leave it "
                "out (or its experiment) or give it as it was, or start a new run in another "
                "out_dir"
            )
        values[key] = now[key]
    result = checked(values, defaults)
    result.explicit = config.explicit
    return result
