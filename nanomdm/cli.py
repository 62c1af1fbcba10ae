"""The command line: Hydra, made to take any text and to answer in one line."""

import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError, visible

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
LINE = 500  # characters, twice: the longest error
VALUES = 10**4  # in a file of settings
FREE_TEXT = {
    *("checkpoint", "prompt", "prompt_file", "out_dir", "data.path", "data.dir", "data.cache_dir"),
    *("training.init_from", "sampling.output", "logging.project", "logging.name"),
    *("eval.against", "eval.plot", "eval.output"),
}
QUIET = (  # what configs/config.yaml says of Hydra, for the settings of tools and benches
    *("hydra.run.dir=.", "hydra.output_subdir=null", "hydra.job.chdir=false"),
    *("hydra/job_logging=disabled", "hydra/hydra_logging=disabled"),
)
TAKE_A_WORD = ("--cfg", "-c", "--info", "-i", "--package", "-p")
OPTIONS = (
    *TAKE_A_WORD,
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--multirun",
    "-m",
)
# Keys, or their beginnings, that a resumed run does not change; and those that a command has to
# repeat where it starts and resumes a run alike.
FIXED = ("model.", "data.tokenizer", "data.vocab_size", "training.optimizer", "training.objective")
REPEATED = (
    *("diffusion.eps", "diffusion.masking", "diffusion.weighting", "system.seed"),
    *("training.batch_size", "training.learning_rate", "training.lr_schedule"),
    *("training.warmup_iters", "training.min_lr_ratio", "training.objective"),
    *("training.optimizer", "training.weight_decay", "training.grad_clip", "training.ema_decay"),
)
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list like [a,b]",
    dict: "a section",
}


class Section(SimpleNamespace):
    """The configuration, or a part of it: plain values behind attributes."""

    def as_dict(self) -> dict:
        return {k: v.as_dict() if isinstance(v, Section) else v for k, v in vars(self).items()}


def section(values: dict) -> Section:
    return Section(**{k: section(v) if isinstance(v, dict) else v for k, v in values.items()})


def main(script: Callable[[Section, set[str]], None], config: str = "config") -> None:
    """Run `script(config, explicit)`; `explicit` are the keys that the command line names.

    Those of an experiment that it names are among them. `config` names the file below configs/ that
    holds the settings: a tool or a bench has a small one of its own, every text of which is free
    text, and no sweeps.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on, instead of printing five lines
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a letter
    path = CONFIGS / f"{config}.yaml"
    decorate = hydra.main(version_base="1.3", config_path=str(path.parent), config_name=path.stem)

    def task(composed) -> None:
        with one_line_errors(config):  # here, too: Hydra prints a line for what leaves a task
            script(*read(composed, config))

    with one_line_errors(config):
        sys.argv[1:] = arrange(sys.argv[1:], config)
        decorate(task)()


@contextmanager
def one_line_errors(config: str = "config"):
    """End a mistake of the user's in one line on stderr.

    The exit code is 2 for bad input (`UserError`), 1 for what fails at run time (`OSError`, and
    `FloatingPointError` for training that diverged). Any other error is a bug and keeps its
    traceback.
    """
    try:
        yield
    except OverrideParseException as error:
        word, reason = error.override.lstrip("+"), str(error).splitlines()[0]
        stop(f"cannot read {word} ({reason}): quote what is special to Hydra", code=2)
    except (HydraException, OmegaConfBaseException) as error:
        merged = re.match(r"Error merging override \+*([\w.]+)=(.*)", str(error))
        if merged:
            key, value = merged.groups()
            error = misfit(key, value, dict(_flat(load_defaults(config), inner=True))[key])
        stop(str(error), code=2)
    except KeyboardInterrupt:
        stop("interrupted", code=130)
    except UserError as error:
        stop(str(error), code=2)
    except (OSError, FloatingPointError) as error:
        stop(str(error), code=1)


def stop(message: str, code: int) -> None:
    """End the process with a line on stderr; of several with the same mistake, the first says it.

    The others wait, and torchrun ends them as soon as the first one has failed.
    """
    if code == 2 and os.environ.get("RANK", "0") != "0":
        time.sleep(10)
    line = visible(" ".join(message.split()))  # a damaged file may be quoted in it
    cut = f"{line[:LINE]} ... {line[-LINE:]}" if len(line) > 2 * LINE else line
    print(f"error: {cut}", file=sys.stderr)
    sys.exit(code)


def read(composed, name: str = "config") -> tuple[Section, set[str]]:
    """The configuration as plain, checked values, and the keys that the command line names."""
    values, job = OmegaConf.to_container(composed, resolve=True), HydraConfig.get()
    values = check_types(values, name)
    config = section(values)
    if job.mode.name == "MULTIRUN" and name != "config":
        raise UserError("-m sweeps train.py, sample.py and eval.py only: leave it out")
    if job.mode.name == "MULTIRUN":  # each job of a sweep has a folder of its own
        config.out_dir = str(Path(config.out_dir, str(job.job.num)))
    explicit = set()
    for word in job.overrides.task:
        key, _, value = word.partition("=")
        key = key.lstrip("+")
        if key == "experiment":
            explicit |= {k for name in experiments(value) for k in _keys(_load_experiment(name))}
        else:
            explicit |= {k for k in _keys(values) if k == key or k.startswith(f"{key}.")}
    return config, explicit


def resumed(stored: dict, config: Section, explicit: set[str], whole: bool) -> Section:
    """An interrupted run's configuration, but for `out_dir` and the keys `explicit` of `config`.

    Raises `UserError` where one of them would make it another run; with `whole`, also where a
    setting that is not among them is not what it was.
    """
    result, fixed = section(check_types(_over(stored, config.as_dict()))), FIXED
    if whole:
        explicit, fixed = explicit | set(REPEATED), FIXED + REPEATED
    for key in sorted(explicit):
        *path, name = key.split(".")
        old, new = result, config
        for part in path:
            old, new = getattr(old, part), getattr(new, part)
        was, value = getattr(old, name), getattr(new, name)
        if was != value and key.startswith(fixed):
            raise UserError(
                f"{key}={value} is not what the interrupted run had ({was}): leave it out (or its "
                "experiment) or give it as it was, or start a new run in another out_dir"
            )
        setattr(old, name, value)
    result.out_dir = config.out_dir
    return result


def _over(stored: dict, values: dict) -> dict:
    """The stored settings; those that an older version had not, from `values`."""
    if not isinstance(stored, dict):
        raise UserError(f"the checkpoint's settings are damaged: {stored!r} is no section")
    return {
        key: _over(stored.get(key, {}), new) if isinstance(new, dict) else stored.get(key, new)
        for key, new in values.items()
    }


# --- Words --------------------------------------------------------------------------------------


def arrange(words: Sequence[str], config: str) -> list[str]:
    """The command line as Hydra has to see it: options first, then settings.

    Words without an equals sign are the items of a tool's first setting, if that is a list:
    `python -m tools.plot out out-ar` means `runs=[out,out-ar]`.
    """
    own, defaults = config != "config", load_defaults(config)
    free_text = {k for k, v in _flat(defaults) if isinstance(v, str)} if own else FREE_TEXT
    first = next(iter(defaults))
    takes_items = own and isinstance(defaults[first], list)
    options, settings, items = [], [], []
    for previous, word in zip(["", *words], words, strict=False):
        if previous in TAKE_A_WORD:
            options.append(word)
        elif word.startswith("-"):
            options.append(prepare_argument(word))
        elif takes_items and "=" not in word.split("/")[0]:  # no key has a slash, a path may
            items.append(quote(word))
        else:
            settings.append(prepare_argument(word, free_text))
    settings += [f"++{first}=[{','.join(items)}]"] if items else []
    return [*options, *settings, *(QUIET if own else ())]


def prepare_argument(word: str, free_text: Collection[str] = FREE_TEXT) -> str:
    """A word of the command line as Hydra has to see it.

    Free text (of the keys `free_text`) is quoted, and any key is let in: `check_types` answers
    better to an unknown one.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if word.startswith("-"):
        if key not in OPTIONS:
            raise UserError(f"no option {word}: a setting is key=value, without dashes")
        return word
    if not equals and not word.startswith("~"):
        raise UserError(f"{word!r} is no setting: write key=value, as in training.max_iters=1000")
    if name == "experiment":
        experiments(value)
        return f"+experiment={value}"
    if word.startswith(("~", "hydra")) or "/" in name:
        return word
    return f"++{name}={quote(value) if name in free_text else value}"


def experiments(value: str) -> list[str]:
    """The names in experiment=NAME or [NAME,NAME]. Raises `UserError` for one without a file."""
    known = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    names = [name.strip() for name in value.strip("[]").split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"no experiment {name!r}: choose one of {', '.join(known)}")
        for key in ("hydra", "defaults"):  # with which Hydra would call what they name
            if key in _load_experiment(name):
                raise UserError(f"experiment {name} sets {key}: an experiment has settings only")
    return names


def _load_experiment(name: str) -> dict:
    return load_yaml(CONFIGS / "experiment" / f"{name}.yaml")


def load_yaml(path: Path) -> dict:
    """The settings in a file, interpolations and all. Raises `UserError` for one that has none."""
    try:
        parts, count = [values := yaml.safe_load(path.read_bytes())], 0
        if not isinstance(values, dict):
            raise UserError("it holds no settings")
        while parts:  # OmegaConf would make copies of what repeats itself by aliases
            part, count = parts.pop(), count + 1
            if count > VALUES:
                raise UserError("it holds too many values")
            if isinstance(part, dict) and set(map(type, part)) - {str}:
                raise UserError("a name is no text")
            parts += part.values() if isinstance(part, dict) else ()
            parts += part if isinstance(part, list) else ()
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of YAML, of its encoding or of OmegaConf
        raise UserError(f"{path} is damaged ({error}): bring it back") from error


def quote(text: str) -> str:
    """`text` in Hydra's quotes, with no interpolation for OmegaConf in it: any text survives."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("an argument is not valid UTF-8: check the terminal's encoding") from None
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text) + "'"


# --- Values --------------------------------------------------------------------------------------


def check_types(values: dict, name: str = "config") -> dict:
    """The configuration with every value of its default's type.

    Raises `UserError` for a key that configs/NAME.yaml has not, and for a value of another type.
    """
    known = list(_keys(defaults := load_defaults(name)))
    for key in _keys(values):
        if not any(k == key or k.startswith(f"{key}.") or key.startswith(f"{k}.") for k in known):
            raise UserError(f"no setting {key}: {_nearest(key, known, name)}")
    return _checked("", values, defaults)


def load_defaults(name: str = "config") -> dict:
    defaults = load_yaml(CONFIGS / f"{name}.yaml")
    return {k: v for k, v in defaults.items() if k not in ("hydra", "defaults")}


def compose(words: Sequence[str], experiment: str = "") -> Section:
    """The configuration of train.py with an experiment and settings `key=value` laid over it.

    What a bench begins with. Raises `UserError` like the command line.
    """
    layers = [load_defaults()]
    layers += [_load_experiment(name) for name in experiments(experiment)] if experiment else []
    merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(list(words)))
    return section(check_types(OmegaConf.to_container(merged)))


def _flat(values: dict, prefix: str = "", inner: bool = False):
    """(dotted key, value) of every setting, and of the sections, too, if `inner`."""
    for key, value in values.items():
        if inner or not isinstance(value, dict):
            yield prefix + key, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.", inner)


def _keys(values: dict):
    return (key for key, _ in _flat(values))


def _checked(key: str, value, default):
    if not isinstance(default, dict) or not isinstance(value, dict):
        return _typed(key, value, default)
    prefix = f"{key}." if key else ""
    if missing := [prefix + name for name in default if name not in value]:
        raise UserError(f"the setting {missing[0]} is missing: do not delete it")
    return {name: _checked(prefix + name, value[name], default[name]) for name in default}


def _nearest(key: str, known: list[str], name: str) -> str:
    same_name = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"configs/{name}.yaml lists them all"


def _typed(key: str, value, default):
    kind, given = type(default), type(value)
    if (kind, given) == (float, int) or (kind, given) == (int, float) and value.is_integer():
        value = kind(value)
    elif kind is str and given in (int, float, bool):  # logging.name=7, system.compile=true
        value = str(value).lower() if given is bool else str(value)
    elif kind is list and given is list:
        value = [str(item) for item in value]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise misfit(key, value, default)
    return value


def misfit(key: str, value, default) -> UserError:
    """The error that says that `value` is not of the kind of the setting `key`."""
    kind = KINDS[type(default)]
    if isinstance(default, dict):
        return UserError(f"{key}={value} is not {kind}: set {key}.{next(iter(default))} and so on")
    return UserError(f"{key}={value} is not {kind}: its default is {default!r}")


def check_numbers(name: str, values: dict, positive: Sequence[str] = ()) -> None:
    """Raise `UserError` for a negative number in the section `name`, and for a 0 if `positive`."""
    for key, value in values.items():
        if not isinstance(value, str) and (value < 0 or (value == 0 and key in positive)):
            kind = "positive" if key in positive else "0 or more"
            raise UserError(f"{name}.{key}={value} must be {kind}")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        *most, last = choices
        raise UserError(f"{key}={value} is unknown: choose {', '.join(most)} or {last}")
