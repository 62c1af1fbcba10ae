"""The command line of the three scripts: Hydra, made to take any text and to answer in one line."""

import difflib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs"
FREE_TEXT = {
    *("checkpoint", "prompt", "out_dir", "data.path", "data.dir", "data.cache_dir"),
    *("training.init_from", "logging.project", "logging.name"),
}
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


def main(script: Callable[[Section, set[str]], None]) -> None:
    """Run `script(config, explicit)`, `explicit` being the keys that the command line names."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on, instead of printing five lines
    decorate = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")

    def task(composed) -> None:
        with one_line_errors():  # here, too: Hydra prints a line of its own for what leaves a task
            script(*read(composed))

    with one_line_errors():
        sys.argv[1:] = [prepare_argument(argument) for argument in sys.argv[1:]]
        decorate(task)()


@contextmanager
def one_line_errors():
    """End a mistake of the user's in one line on stderr, with exit code 2 for bad input
    (`ValueError`) and 1 for what fails at run time (`OSError`, `RuntimeError`).

    Only errors that this project raises are treated so: others are bugs and keep their traceback.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        stop(error, code=2)
    except (ValueError, OSError, RuntimeError) as error:
        if not raised_here(error):
            raise
        stop(error, code=2 if isinstance(error, ValueError) else 1)


def read(composed) -> tuple[Section, set[str]]:
    """The configuration as plain, checked values, and the keys that the command line names."""
    values, job = OmegaConf.to_container(composed, resolve=True), HydraConfig.get()
    config = section(check_types(values))
    if job.mode.name == "MULTIRUN":  # each job of a sweep has a folder of its own
        config.out_dir = str(Path(config.out_dir, str(job.job.num)))
    return config, {word.split("=")[0].lstrip("+~") for word in job.overrides.task}


def stop(error: Exception, code: int) -> None:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


def raised_here(error: Exception) -> bool:
    """Whether the statement that raised the error is one of this project's."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent == ROOT


# --- Words --------------------------------------------------------------------------------------


def prepare_argument(word: str) -> str:
    """A word of the command line as Hydra has to see it.

    Free text is quoted, and any key is let in: `check_types` answers better to an unknown one.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if name == "experiment":
        check_experiments(value)
        return f"+experiment={value}"
    if word.startswith(("-", "~", "hydra")) or "/" in name:
        return word
    if not equals:
        raise ValueError(f"{word!r} is no setting: write key=value, as in training.max_iters=1000")
    return f"++{name}={quote(value) if name in FREE_TEXT else value}"


def check_experiments(value: str) -> None:
    """Raise `ValueError` for a name that has no file in configs/experiment."""
    known = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    for name in value.strip("[]").split(","):
        if name.strip() not in known:
            raise ValueError(f"no experiment {name!r}: choose one of {', '.join(known)}")


def quote(text: str) -> str:
    """`text` in Hydra's quotes, with no interpolation for OmegaConf in it: any text survives."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("an argument is not valid UTF-8: check the terminal's encoding") from None
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), text) + "'"


# --- Types --------------------------------------------------------------------------------------


def check_types(values: dict) -> dict:
    """The configuration with every value of its default's type.

    Raises `ValueError` for a key that configs/config.yaml has not, and for a value of another type.
    """
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / "config.yaml"), resolve=False)
    defaults = {k: v for k, v in defaults.items() if k not in ("hydra", "defaults")}
    return _checked("", values, defaults, list(_dotted(defaults)))


def _dotted(values: dict, prefix: str = ""):
    for key, value in values.items():
        yield from _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def _checked(key: str, value, default, known: list[str]):
    if not isinstance(default, dict) or not isinstance(value, dict):
        return _typed(key, value, default)
    prefix = f"{key}." if key else ""
    if unknown := [prefix + name for name in value if name not in default]:
        raise ValueError(f"no setting {unknown[0]}: {_nearest(unknown[0], known)}")
    if missing := [prefix + name for name in default if name not in value]:
        raise ValueError(f"the setting {missing[0]} is missing: do not delete it")
    return {k: _checked(prefix + k, value[k], default[k], known) for k in default}


def _nearest(key: str, known: list[str]) -> str:
    same_name = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "configs/config.yaml lists them all"


def _typed(key: str, value, default):
    kind, given = type(default), type(value)
    if (kind, given) == (float, int) or (kind, given) == (int, float) and value.is_integer():
        value = kind(value)
    elif kind is str and given in (int, float, bool):  # logging.name=7, system.compile=true
        value = str(value).lower() if given is bool else str(value)
    elif kind is list and given is list:
        value = [str(item) for item in value]
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{key}={value} is not {KINDS[kind]}: its default is {default!r}")
    return value
