"""The command line: any text arrives as it is, and a mistake is answered in one line."""

import inspect
import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, environment
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import model
import train
from nanomdm import cli, texts
from nanomdm.errors import UserError
from nanomdm.runlog import Log
from tools import view

EXPERIMENTS = sorted(path.stem for path in (cli.CONFIGS / "experiment").glob("*.yaml"))
DEFAULTS = cli.flat(cli.load_defaults())
FREE_TEXT = sorted(
    key for key, default in DEFAULTS.items() if isinstance(default, str) and key not in cli.CHOICES
)
TEXTS = (
    *("", " ", "  a  ", "\t", "\n", "two\nlines\n", "\r\n", "tab\tbed", "Hello, world", "a,b"),
    *("What's in a name?", "'", "''", "'quoted'", '"', '"quoted"', "'\"", "\\", "\\\\", "\\'"),
    *('\\"', "\\\\'", "ends with \\", "a\\\\", "C:\\new\\table", "1984", "-1", "1e3", "0x1F"),
    *("true", "null", "None", "nan", "inf", "???", "a=b", "=", "a=b=c", "[a,b]", "{a:b}", "(a)"),
    *("~x", "+x", "++x", "-x", "--help", "@x", "a:b", "a/b", "..", "*", "?", "#", "%", "$", "$x"),
    *("${y}", "\\${y}", "\\\\${y}", "${", "$${y}", "${${y}}", "${oc.env:HOME}", "'${y}'", "}"),
    *(
        "glob(*)",
        "choice(a,b)",
        "range(1,3)",
        "int('1')",
        "naïve café",
        "日本語",
        "\u202e",
        "\ufeff",
    ),
    *("🦜🏽", "e\u0301", "\x01", "\x7f", "\x85", "\u2028", "a" * 5000),
)
MEANINGFUL = "".join(TEXTS)  # characters that mean something to a shell, to Hydra or to OmegaConf
ARGUMENTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    | st.sampled_from("'\"\\$ {}[](),=:~+-#%&\n\t"),
    max_size=20,
)


@pytest.fixture
def configure(run, monkeypatch):
    """configure("key=value", ...): the (configuration, explicit keys) of each call of a script."""

    def configure(*words: str) -> list[tuple[dict, set[str]]]:
        calls = []
        with monkeypatch.context() as patch:
            patch.setitem(SCRIPTS, "train.py", calls.append)
            patch.setitem(cli.READS, "train.py", ("",))
            patch.setattr(cli, "IDLE", ())
            result = run("train.py", *words)
        assert result == (0, "", "")
        return [(config.as_dict(), config.explicit) for config in calls]

    return configure


@pytest.fixture
def refusal(run, monkeypatch):
    """refusal("key=value", ...): the line that a mistake ends with, before anything is done."""

    def refusal(*words: str) -> str:
        with monkeypatch.context() as patch:
            patch.setitem(SCRIPTS, "train.py", lambda _: pytest.fail("it was accepted"))
            code, out, err = run("train.py", *words)
        assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: "), err
        return err.removeprefix("error: ").removesuffix("\n")

    return refusal


def get(config: dict, key: str):
    for name in key.split("."):
        config = config[name]
    return config


def composed(texts: dict[str, str]) -> dict[str, str]:
    """What becomes of texts by key on their way through Hydra."""
    config = cli.compose([f"{key}={text}" for key, text in texts.items()]).as_dict()
    return {key: get(config, key) for key in texts}


def test_words_without_an_equals_sign_are_the_items_of_a_tools_first_list(run, monkeypatch):
    words, received = [*TEXTS[2:7], "a,b", "[a", "it's", "./a=b", "${y}", "new"], []
    words = [word for word in words if word.strip()]
    monkeypatch.setattr("bench.recipe.main", received.append)
    result = run("bench.recipe", *words, "steps=7")
    assert result.code == 0, result.err
    [config] = received
    assert (config.variations, config.steps) == (words, 7)
    assert config.explicit == {"variations", "steps"}


def test_a_tool_whose_first_setting_is_a_text_takes_no_such_words(run):
    result = run("bench.judge", "out")
    assert (result.code, result.err.count("\n")) == (2, 1) and "key=value" in result.err


# --- Free text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", range(0, len(TEXTS), len(FREE_TEXT)))
def test_texts_that_mean_something_to_hydra_arrive_as_they_are(start):
    texts = dict(zip(FREE_TEXT, TEXTS[start:], strict=False))
    texts.pop("data.dir", None)  # which excludes data.path
    assert composed(texts) == texts


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(ARGUMENTS, min_size=len(FREE_TEXT), max_size=len(FREE_TEXT)))
def test_any_text_arrives_as_it_is(texts):
    by_key = dict(zip(FREE_TEXT, texts, strict=True)) | {"data.dir": ""}
    inputs = ("checkpoint", "eval.against", "data.path", "prompt_file")
    output = Path(by_key["output"])
    assume(not by_key["output"] or output.name)
    assume(all(output.resolve() != Path(by_key[key]).resolve() for key in inputs))
    assert composed(by_key) == by_key


def test_prompts_paths_and_names_are_free_text():
    keys = {
        "prompt",
        "prompt_file",
        "blank",
        "checkpoint",
        "out_dir",
        "output",
        "data.path",
        "data.dir",
    }
    others = {"training.init_from", "eval.against", "logging.project", "logging.name"}
    assert set(FREE_TEXT) == keys | others


@pytest.mark.parametrize("key", ["prompt", "+prompt", "++prompt", "data.path", "data.dir"])
def test_free_text_reaches_the_script_as_it_is(configure, key):
    [(config, explicit)] = configure(f"{key}={MEANINGFUL}")
    assert get(config, key.lstrip("+")) == MEANINGFUL and explicit == {key.lstrip("+")}


def test_free_text_reaches_the_jobs_of_a_sweep_as_it_is(configure):
    calls = configure("-m", f"prompt={MEANINGFUL}", "num_samples=1,2")
    assert [config["prompt"] for config, _ in calls] == [MEANINGFUL] * 2


def typed_into_a_shell(words: str) -> list[str]:
    """What a script gets of them."""
    command = f"'{sys.executable}' -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {words}"
    return json.loads(subprocess.check_output(command, shell=True))


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("""prompt="What's in a name?" """, "What's in a name?"),
        ("""prompt='${y} \\${y} $HOME "{}" \\'""", '${y} \\${y} $HOME "{}" \\'),
        ("""prompt=To\\ be,\\ or\\ not='[\n\t🦜]~'""", "To be, or not=[\n\t🦜]~"),
    ],
    ids=["double quotes", "single quotes", "backslashes"],
)
def test_free_text_typed_into_a_shell_arrives_as_it_is(typed, text, configure):
    [(config, explicit)] = configure(*typed_into_a_shell(typed))
    assert config["prompt"] == text and explicit == {"prompt"}


def test_a_sample_begins_with_the_prompt_that_was_typed_into_a_shell(run, trained):
    words = typed_into_a_shell('prompt="KING 4, 5: The crown,\nand" sampling.steps=2')
    result = run("sample.py", *words, f"checkpoint={trained}/ckpt.pt")
    assert result.out.startswith("KING 4, 5: The crown,\nand")


def test_an_argument_that_is_not_utf_8_is_refused(refusal):
    assert "UTF-8" in refusal("prompt=caf\udce9")


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        (("logging.tags=[a]", "logging.tags=[]"), []),
        (("logging.tags=[a]", 'logging.tags=["b"]'), ["b"]),
        (('logging.tags=["b"]', "logging.tags=[a]"), ["a"]),
        (("logging.tags=[ ]",), []),
    ],
)
def test_the_last_word_for_a_list_counts_however_it_is_written(configure, words, tags):
    [(config, _)] = configure(*words)
    assert get(config, "logging.tags") == tags


@pytest.mark.parametrize("key", ["prompt", "data.path", "logging.name"])
def test_a_text_may_be_empty(configure, key):
    [(config, explicit)] = configure(f"{key}=")
    assert get(config, key) == "" and explicit == {key}


# --- Keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("training.max_itrs=5", "training.max_iters"),
        ("Training.max_iters=5", "training.max_iters"),
        ("max_iters=5", "training.max_iters"),
        ("model.layers=3", "model.n_layer"),
        ("modl.n_layer=3", "model.n_layer"),
        ("promt=x", "prompt"),
        ("+data.file_path=x", "data.path"),
        ("system.devise=cpu", "system.device"),
        ("dir=x", "data.dir"),
        ("model.n_layer.x=1", "model.n_layer"),
        ("~training.max_iters=1", "training.max_iters"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest_right_one(refusal, word, right):
    line = refusal(word)
    assert word.lstrip("+").split("=")[0] in line and f"did you mean {right}?" in line


@pytest.mark.parametrize("word", ["qqq=1", "qqq.xxx=1", "defaults=[]", "hydra.verbose=true"])
def test_a_key_like_no_other_is_answered_with_where_to_look(refusal, word):
    line = refusal(word)
    assert word.lstrip("+").split("=")[0] in line and "configs/config.yaml" in line


@pytest.mark.parametrize("word", ["training.foo=1", "+training.foo=1", "++training.foo=1"])
def test_no_key_can_be_added(refusal, word):
    assert "training.foo" in refusal(word)


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_before_a_key_changes_nothing(configure, plus):
    [(config, explicit)] = configure(f"{plus}training.max_iters=7")
    assert config["training"]["max_iters"] == 7 and explicit == {"training.max_iters"}


@pytest.mark.parametrize("word", ["model=3", "model={n_layer: 2}", "training=null"])
def test_a_section_is_set_key_by_key(refusal, word):
    assert f"no setting {word.split('=')[0]}: did you mean" in refusal(word)


@pytest.mark.parametrize("key", ["training.max_iters", "training", "prompt"])
def test_no_key_can_be_deleted(refusal, key):
    assert f"~{key}" in refusal(f"~{key}")


@pytest.mark.parametrize("word", ["hello", "", "out/ckpt.pt", "training.max_iters"])
def test_a_word_without_an_equals_sign_is_answered_with_the_form(refusal, word):
    line = refusal(word)
    assert word in line and "key=value" in line


@pytest.mark.parametrize("word", ["--max_iters=5", "-x", "--prompt"])
def test_an_option_that_is_none_is_answered_in_one_line(refusal, word):
    assert word in refusal(word)


@pytest.mark.parametrize(
    "word",
    [
        *("training.max_iters=[1", "training.max_iters=(", "training.max_iters=1,2"),
        *("model.n_layer =3", "training.max_iters=${nope}", "training.max_iters=${training}"),
        *("logging.tags=[a", "logging.tags={a:b}", "sampling.options=[1]", "sampling.options={a"),
        "training.max_iters=${training.max_iters}",
    ],
)
def test_what_hydra_cannot_read_is_answered_in_one_line_with_the_key(refusal, word):
    assert word.split("=")[0] in refusal(word)


# --- Values -------------------------------------------------------------------------------------

ILL_TYPED = {
    "bool": ["logging.wandb=yes", "logging.wandb=1", "sampling.watch="],
    "int": [
        *("model.n_layer=2.5", "model.n_layer=four", "model.n_layer=true", "model.n_layer="),
        *("model.n_layer=null", "model.n_layer=[1]", "model.n_layer={x: 1}"),
        *("model.n_layer=1e400", "system.seed=nan"),
    ],
    "float": ["model.dropout=x", "model.dropout=true", "model.dropout=[1]", "model.dropout="],
    "list": ["logging.tags=x", "logging.tags=null", "logging.tags="],
    "dict": ["sampling.options=3", "sampling.options=x"],
}


@pytest.mark.parametrize(
    ("kind", "word"), [(kind, word) for kind, words in ILL_TYPED.items() for word in words]
)
def test_a_value_of_another_type_is_answered_with_the_type(refusal, kind, word):
    line = refusal(word)
    assert line.startswith(word.split("=")[0]) and f" is not of type {kind}," in line


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("model.dropout=0", 0.0),
        ("training.learning_rate=6e-4", 0.0006),
        ("training.max_iters=1e3", 1000),
        ("training.max_iters=20.0", 20),
        ("logging.name=7", "7"),
        ("system.compile=true", "true"),
        ("logging.wandb=True", True),
        ("logging.tags=[small,1]", ["small", "1"]),
        ("logging.tags=[]", []),
        ("logging.tags=[lr=1e-3]", ["lr=1e-3"]),
        ("logging.tags=[lr=1e-3, What?, ${y}, 007]", ["lr=1e-3", "What?", "${y}", "007"]),
        ("""logging.tags=["a,b",'it is']""", ["a,b", "it is"]),
        ("system.seed=12345678901234567890", 12345678901234567890),
        ("training.warmup_iters=${training.batch_size}", 16),
    ],
)
def test_a_value_of_a_type_that_fits_gets_the_type_of_the_default(configure, word, value):
    key = word.split("=")[0]
    given = get(configure(word)[0][0], key)
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["sampling.options={threshold: 0.9}"], {"threshold": 0.9}),
        (["sampling.options={threshold:0.9,gamma:1}"], {"threshold": 0.9, "gamma": 1}),
        (["sampling.options.threshold=0.9"], {"threshold": 0.9}),
        (["sampling.options.a=text", "sampling.options.b=true"], {"a": "text", "b": True}),
        (["sampling.threshold=0.5", "sampling.top_k=3"], {"threshold": 0.5, "top_k": 3}),
        (["sampling.options={}"], {}),
        ([], {}),
    ],
)
def test_options_are_a_dictionary_of_any_keys(configure, words, options):
    [(config, explicit)] = configure(*words)
    assert config["sampling"]["options"] == options
    named = {"sampling.options", *(f"sampling.options.{name}" for name in options)}
    assert explicit == (named if words else set())


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("training.learning_rate=nan", "training.learning_rate=nan must be positive"),
        ("training.learning_rate=inf", "training.learning_rate=inf must be positive"),
        ("num_samples=0", "num_samples=0 must be positive"),
        ("sampling.temperature=inf", "sampling.temperature=inf must be 0 or more"),
        ("sampling.options.threshold=text", "sampling.options.threshold=text must be in [0, 1]"),
        ("system.dtype=float8", "choose one of auto, float32, bfloat16, float16"),
    ],
)
def test_a_value_out_of_its_range_is_answered_with_the_range(refusal, word, named):
    assert named in refusal(word)


def test_every_key_that_is_named_in_a_table_is_a_setting():
    ranged = {key for _, keys in cli.RANGES.values() for key in keys}
    tables = {*ranged, *cli.CHOICES, *cli.REPEATED, *cli.RENAMED.values()}
    tables = {key for key in tables if not key.startswith("sampling.options.")}
    assert tables - DEFAULTS.keys() == {"experiment"}
    assert all(any(key.startswith(fixed) for key in DEFAULTS) for fixed in cli.FIXED)
    assert not DEFAULTS.keys() & (cli.RENAMED.keys() | cli.GONE.keys())


# --- Settings of earlier versions, and without effect -------------------------------------------


@pytest.mark.parametrize("short", cli.RENAMED)
def test_an_option_may_be_written_as_a_setting(configure, short):
    new = cli.RENAMED[short]
    [(config, explicit)] = configure(f"{short}=1")
    assert get(config, new) == 1
    assert explicit == ({"sampling.options", new} if "options" in new else {new})


def test_a_setting_without_effect_is_said_in_one_line(run, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "sample.py", lambda config: None)
    monkeypatch.setitem(cli.READS, "sample.py", ("prompt", "sampling."))
    words = ("prompt=x", "prompt_file=y", "sampling.steps=3")
    assert run("sample.py", *words, "training.max_iters=3") == (
        0,
        "",
        "training.max_iters has no effect on sample.py\n",
    )
    assert run("sample.py", "-m", *words, "out_dir=a", "num_samples=1,2").err == (
        "out_dir has no effect on sample.py\nnum_samples has no effect on sample.py\n"
    )


@pytest.mark.parametrize(
    ("script", "words", "why"),
    [
        ("train.py", "data.vocab_size=9", "with data.tokenizer=char"),
        ("train.py", "data.path=a.txt data.dataset=plays", "with data.path=a.txt"),
        ("train.py", "data.dir=a data.dataset=plays", "with data.dir=a"),
        ("train.py", "training.objective=ar diffusion.weighting=1", "with training.objective=ar"),
        ("train.py", "training.eval_interval=0 eval.tokens=9", "with training.eval_interval=0"),
        ("train.py", "training.sample_interval=0 sampling.steps=3", "sample_interval=0"),
        ("train.py", "sampling.strategy=eb sampling.steps=3", "with sampling.strategy=eb"),
        ("train.py", "logging.name=x", "with logging.wandb=False"),
        ("train.py", "logging.tags=[x]", "with logging.wandb=False"),
        ("train.py", "sampling.length=3", "on train.py"),
        ("train.py", "checkpoint=x", "on train.py"),
        (
            "sample.py",
            "sampling.strategy=threshold sampling.steps=3",
            "sampling.strategy=threshold",
        ),
        ("sample.py", "sampling.temperature=0 sampling.options.top_p=0.5", "temperature=0.0"),
        ("sample.py", "system.parallel=ddp", "on sample.py"),
        ("sample.py", "data.path=x", "on sample.py"),
        ("sample.py", "+experiment=small", "on sample.py"),
        ("sample.py", "sampling.options.guidance=2", "with prompt= and prompt_file="),
        ("train.py", "training.objective=ar sampling.strategy=eb", "training.objective=ar"),
        ("train.py", "data.dir=a data.vocab_size=9", "with data.dir=a and data.tokenizer=char"),
        ("eval.py", "sampling.temperature=2", "with eval.samplers=[]"),
        ("eval.py", "eval.samplers=[eb] sampling.steps=2", "eval.samplers=['eb'] and eval.bounds="),
        ("eval.py", "data.vocab_size=9", ""),
        ("tools.view", "sampling.strategy=eb sampling.steps=3", "with sampling.strategy=eb"),
        ("train.py", "data.tokenizer=bpe data.vocab_size=300", None),
        ("train.py", "logging.interval=3", None),
        ("train.py", "+experiment=small", None),
        ("sample.py", "sampling.strategy=margin sampling.steps=3", None),
        ("eval.py", "eval.bounds=[discrete] sampling.steps=2", None),
        ("eval.py", "eval.samplers=[eb,margin] sampling.steps=2", None),
        ("tools.view", "sampling.steps=3", None),
    ],
)
def test_an_explicit_setting_never_goes_unheard(run, monkeypatch, script, words, why):
    """It is said, in one line, why the last of the words has no effect; or, None, nothing is."""
    nothing = lambda config: None  # noqa: E731
    if script in SCRIPTS:
        monkeypatch.setitem(SCRIPTS, script, nothing)
    else:
        monkeypatch.setattr(view, "main", nothing)
    result = run(script, *words.split())
    key = words.split()[-1].split("=")[0].lstrip("+")
    if why == "":
        assert result.code == 2 and "the checkpoint decides it" in result.err
    elif why is None:
        assert result == (0, "", "")
    else:
        assert result.code == 0 and result.err.count("\n") == 1
        assert result.err.startswith(f"{key} has no effect ") and why in result.err


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("optimizer.lr", "training.learning_rate"),
        ("batch", "training.batch_size"),
        ("temp", "sampling.temperature"),
        ("model.layers", "model.n_layer"),
        ("training.seed", "system.seed"),
        ("sampling.output", "output"),
        ("top_p", "sampling.top_p"),
        ("sampling.stepz", "sampling.steps"),
    ],
)
def test_a_key_that_somebody_may_mean_is_found(refusal, word, meant):
    assert f"no setting {word}: did you mean {meant}?" in refusal(f"{word}=3")


@pytest.mark.parametrize(
    "word", ["training.max_iters=1e30", "sampling.options={block_length: 99999999999999999999}"]
)
def test_a_number_beyond_64_bits_is_too_large(refusal, word):
    assert "is too large: it must be below 2^63" in refusal(word)


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60), lambda: np.empty(2**50)],
    ids=["torch", "numpy"],
)
def test_a_lack_of_memory_is_one_line(run, monkeypatch, allocate):
    monkeypatch.setitem(SCRIPTS, "train.py", lambda config: allocate())
    result = run("train.py")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith("error: not enough memory, take a smaller model, batch or text")


def test_another_error_of_torch_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "train.py", lambda config: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run("train.py")


def test_a_sweep_goes_on_after_a_run_that_diverges_and_ranks_its_runs(run, text_file):
    words = (*TINY, f"data.path={text_file}", "out_dir=sweep", "training.sample_interval=0")
    result = run("train.py", "-m", *words, "training.learning_rate=1e30,3e-3,1e-2")
    assert result.code == 1
    assert "error: loss or gradient was not finite in" in result.err
    header, *ranked = result.out.splitlines()[-4:]
    assert header.startswith("runs of the sweep by their lowest loss on val")
    assert ranked[0].endswith("sweep/2  training.learning_rate=0.01")
    assert ranked[1].endswith("sweep/1  training.learning_rate=0.003")
    assert ranked[2].endswith("sweep/0  training.learning_rate=1e+30 (failed)")
    for line in ranked:
        folder = line.split()[3]
        entries = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        bounds = [e for e in entries if "eval/val_loss" in e]
        best = min(bounds, key=lambda e: e["eval/val_loss"])
        assert line.startswith(f"{best['eval/val_loss']:.4f} ± {best['eval/val_error']:.4f} ")


def test_a_mistake_in_any_job_of_a_sweep_is_found_before_the_first_begins(run, monkeypatch):
    begun = []
    monkeypatch.setitem(SCRIPTS, "train.py", begun.append)
    result = run("train.py", "-m", "training.learning_rate=1e-3,abc")
    assert result.code == 2 and "learning_rate=abc is not of type float" in result.err
    assert not begun


def test_a_note_of_a_sweep_is_said_once_at_the_jobs_that_it_is_about(run, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "sample.py", lambda config: None)
    words = ("sampling.strategy=spread,eb,threshold", "sampling.steps=4", "system.seed=1,2")
    assert run("sample.py", "-m", *words).err.splitlines() == [
        "sampling.steps has no effect with sampling.strategy=eb",
        "sampling.steps has no effect with sampling.strategy=threshold",
    ]


def test_the_jobs_of_a_sweep_have_an_output_each(run, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "eval.py", lambda config: print(config.output))
    result = run("eval.py", "-m", "output=a/b.json", "eval.draws=1,2")
    assert result.out == "a/b-0.json\na/b-1.json\n"


def test_a_script_of_the_users_own_has_the_notes_of_the_one_that_it_calls(run, monkeypatch, capfd):
    import sample

    monkeypatch.setattr(sys, "argv", ["my/run.py", "training.max_iters=5", "checkpoint=nowhere"])
    with pytest.raises(SystemExit):
        cli.main(sample.main)
    assert capfd.readouterr().err.startswith("training.max_iters has no effect on sample.py\n")


def test_a_closed_stdout_is_no_error(tmp_path):
    code = "from nanomdm import cli; cli.main(lambda config: print(config.prompt))"
    command = f"'{sys.executable}' -c '{code}' >&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment()).returncode == 0


def test_a_sweep_without_evaluations_lists_its_runs(run, text_file):
    words = (*TINY, f"data.path={text_file}", "training.sample_interval=0")
    result = run("train.py", "-m", *words, "training.eval_interval=0", "system.seed=1,2")
    assert [line.split()[:3] for line in result.out.splitlines()[-2:]] == [
        ["not", "evaluated", "out/0"],
        ["not", "evaluated", "out/1"],
    ]


def test_only_the_first_process_says_that_a_setting_has_no_effect(run, monkeypatch):
    monkeypatch.setitem(SCRIPTS, "train.py", lambda config: None)
    monkeypatch.setattr(cli, "RANK", 1)
    assert run("train.py", "prompt=x") == (0, "", "")


def test_what_contradicts_is_refused(refusal):
    assert "leave one of them empty" in refusal("data.path=a.txt", "data.dir=bins")
    assert "leave one of them empty" in refusal("data.path=a.txt", "experiment=openwebtext")


# --- Experiments --------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["experiment=large", "+experiment=large", "experiment="])
def test_an_unknown_experiment_is_answered_with_the_known_ones(refusal, word):
    assert ", ".join(EXPERIMENTS) in refusal(word)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_only_known_keys_and_values_of_their_types(configure, name):
    overlay = OmegaConf.to_container(OmegaConf.load(cli.CONFIGS / "experiment" / f"{name}.yaml"))
    [(config, _)] = configure(f"+experiment={name}")
    assert all(config[part] == config[part] | values for part, values in overlay.items())


def test_an_experiment_needs_no_plus(configure):
    assert configure("experiment=small") == configure("+experiment=small")


@pytest.mark.parametrize("order", [1, -1])
def test_the_command_line_goes_before_an_experiment(configure, order):
    words = ["experiment=small", "model.n_layer=2"]
    [(config, _)] = configure(*words[::order])
    assert (config["model"]["n_layer"], config["model"]["n_head"]) == (2, 6)


def test_two_experiments_are_laid_over_each_other(configure):
    [(config, _)] = configure("experiment=[text8,small]")
    assert (config["data"]["path"], config["model"]["n_layer"]) == ("text8", 6)


def test_experiments_can_be_swept_over(configure):
    calls = configure("-m", f"experiment={','.join(EXPERIMENTS)}")
    assert len({repr(config) for config, _ in calls}) == len(EXPERIMENTS)


# --- Sweeps -------------------------------------------------------------------------------------


def swept(calls: list, *keys: str) -> list[tuple]:
    return [tuple(get(config, key) for key in keys) for config, _ in calls]


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_a_sweep_is_the_product_of_the_values_that_are_listed(configure, option):
    calls = configure("training.max_iters=1,2", option, "training.optimizer=adamw,muon")
    assert swept(calls, "training.max_iters", "training.optimizer", "out_dir") == [
        *((1, "adamw", "out/0"), (1, "muon", "out/1"), (2, "adamw", "out/2"), (2, "muon", "out/3")),
    ]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("training.learning_rate=1e-3,3e-3", [1e-3, 3e-3]),
        ("training.max_iters=range(1,4)", [1, 2, 3]),
        ("training.max_iters=choice(5,7)", [5, 7]),
        ("system.compile=true,auto", ["true", "auto"]),
        ("eval.bounds=[uniform,chain],[discrete]", [["uniform", "chain"], ["discrete"]]),
        ("logging.tags=[lr=1e-3,b]", [["lr=1e-3", "b"]]),
        ("sampling.options={a:1},{a:2}", [{"a": 1}, {"a": 2}]),
        ("logging.name=a,b", ["a,b"]),
        ("model.n_layer=2", [2]),
    ],
)
def test_values_and_names_of_things_are_swept_over_and_free_text_is_not(configure, word, values):
    key = word.partition("=")[0]
    assert swept(configure("-m", word), key) == [(value,) for value in values]


def test_a_sweep_over_nothing_is_refused(refusal):
    line = refusal("-m", "training.max_iters=range(1,1)")
    assert "training.max_iters=range(1,1) is a sweep over nothing" in line


def test_several_values_need_the_option(refusal):
    assert "--multirun" in refusal("training.max_iters=1,2")


# --- What a command leaves behind ---------------------------------------------------------------

SHORT = (*TINY, "training.max_iters=1", "training.eval_interval=0", "training.sample_interval=0")


def test_a_run_leaves_nothing_but_its_out_dir(run, text_file, tmp_path):
    assert run("train.py", *SHORT, f"data.path={text_file}", "out_dir=mine").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("script", ["sample.py", "eval.py"])
def test_sampling_and_evaluating_leave_nothing(run, trained, tmp_path, script):
    words = ("sampling.steps=4", "system.device=cpu")
    assert run(script, f"checkpoint={trained}/ckpt.pt", *words).code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["nope=1"], ["experiment=nope"], ["training.max_iters=[1"]])
def test_a_mistake_leaves_nothing(refusal, tmp_path, words):
    refusal(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sweep(run, text_file):
    """The words of a sweep on the tiny corpus, into the folder `swept`."""
    data = (f"data.path={text_file}", "out_dir=swept")
    result = run("train.py", "-m", *SHORT, *data, "training.max_iters=1,2")
    assert result.code == 0, result
    return Path("swept")


def test_each_job_of_a_sweep_has_an_out_dir_of_its_own(sweep):
    lines = [(sweep / job / "metrics.jsonl").read_text().count("\n") for job in ("0", "1")]
    assert lines == [1, 2] and all((sweep / job / "ckpt.pt").is_file() for job in ("0", "1"))


def test_a_sweep_leaves_nothing_outside_its_out_dir(sweep):
    assert [path.name for path in sweep.resolve().parent.iterdir()] == ["swept"]


# --- Help, and what is between a command and its script -----------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_prints_every_setting_with_its_explanation(run, option):
    code, out, _ = run("train.py", option, "training.max_iters=3")
    assert (code, out.strip()) == (0, (cli.CONFIGS / "config.yaml").read_text().strip())


def test_there_is_one_frame_between_a_command_and_its_script(run, monkeypatch):
    frames = []
    monkeypatch.setitem(SCRIPTS, "train.py", lambda config: frames.extend(inspect.stack()))
    assert run("train.py", "model.n_layer=2").code == 0
    assert [frame.function for frame in frames[:3]] == ["<lambda>", "main", "run"]


def test_what_the_command_line_names_is_known_of_the_whole_and_no_setting(configure):
    config = cli.compose(["model.n_layer=2"], "small")
    assert {"model.n_layer", "training.max_iters"} <= config.explicit
    assert config.model.explicit == set() and "explicit" not in config.as_dict()
    assert (config.model.n_layer, config.model.n_head) == (2, 6)


# --- Resuming -----------------------------------------------------------------------------------


EARLIER = {"training.keep": 0, "sampling.top_p": 1.0, "sampling.threshold": 0.9}


def stored(changes: dict) -> dict:
    """What a run of an earlier version stored: it had more settings."""
    values = cli.load_defaults()
    del values["output"], values["sampling"]["options"]
    for key, value in (EARLIER | cli.GONE | {"training.eval_tokens": 0} | changes).items():
        section, name = key.split(".")
        values[section][name] = value
    return values


def resumed(changes: dict, *words: str, whole: bool = False) -> cli.Section:
    return cli.resumed(stored(changes), cli.compose(words), whole)


def test_a_run_of_before_resumes_with_what_it_stored():
    changes = {"training.eval_tokens": 512, "eval.tokens": 3, "sampling.gamma": 0.5}
    changes |= {"sampling.threshold": 0.9, "sampling.guidance": 0.0, "training.keep": 2}
    config = resumed(changes | {"model.n_layer": 7, "logging.name": "${x}"}, "out_dir=elsewhere")
    assert (config.eval.tokens, config.sampling.options) == (512, {"gamma": 0.5})
    assert (config.model.n_layer, config.logging.name) == (7, "${x}")
    assert config.out_dir == "elsewhere"
    assert cli.flat(config.as_dict()).keys() == DEFAULTS.keys()


def test_a_run_of_today_resumes_with_what_it_stored():
    before = cli.compose(["eval.tokens=5", "sampling.options={top_k: 3}", "output=x"])
    config = cli.resumed(before.as_dict(), cli.compose(["logging.interval=3"]), whole=False)
    assert (config.eval.tokens, config.sampling.options, config.output) == (5, {"top_k": 3}, "x")
    assert config.logging.interval == 3 and config.explicit == {"logging.interval"}


def test_options_that_are_named_on_resuming_replace_the_stored_ones():
    config = resumed({"sampling.gamma": 0.5}, "sampling.options.top_k=3")
    assert config.sampling.options == {"top_k": 3}


@pytest.mark.parametrize(
    ("key", "value"),
    [("diffusion.eps", 1e-2), ("diffusion.masking", "count"), ("training.min_lr_ratio", 0.1)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_run_of_another_loss_or_schedule_than_there_is_now_is_not_resumed(key, value, whole):
    with pytest.raises(UserError, match=f"{key}={value}, .* the version that began it"):
        resumed({key: value}, whole=whole)


@pytest.mark.parametrize("value", [3, None, [], torch.zeros(3), {"x": torch.zeros(3)}])
@pytest.mark.parametrize(
    "key", ["diffusion.eps", "sampling.gamma", "training.eval_tokens", "model.n_layer"]
)
def test_any_value_that_is_stored_is_taken_or_refused_in_one_line(key, value):
    with suppress(UserError):
        resumed({key: value})


def test_settings_are_not_named_twice_by_resuming_and_by_starting_from_weights():
    words = ("training.resume=true", "training.init_from=best.pt")
    with pytest.raises(UserError, match="init_from starts a run"):
        resumed({}, *words)
    assert resumed({}, "training.init_from=best.pt", whole=True)


# --- Exit codes ---------------------------------------------------------------------------------


@pytest.fixture
def short_run(run, text_file):
    """short_run("key=value", ...): a run of one step on the tiny corpus."""
    return lambda *words: run("train.py", *SHORT, f"data.path={text_file}", *words)


def test_a_run_to_its_end_has_exit_code_0(short_run):
    assert short_run().code == 0


def test_a_failure_at_run_time_is_one_line_with_exit_code_1(short_run, monkeypatch):
    monkeypatch.setattr(Log, "metrics", lambda *_: shutil.rmtree("out"))
    code, _, err = short_run()
    assert (code, err.count("error: "), err.splitlines()[-1][:7]) == (1, 1, "error: "), err


@pytest.mark.parametrize("width", [32, 256])  # two ways in which torch.save fails
def test_a_full_disk_is_one_line_with_exit_code_1_that_names_the_file(short_run, width):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # less than a checkpoint
    try:
        code, _, err = short_run(f"model.n_embd={width}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err.count("error: "), err.splitlines()[-1][:7]) == (1, 1, "error: "), err
    assert "out/ckpt.pt" in err


def test_an_interrupted_run_has_exit_code_130(short_run, monkeypatch):
    monkeypatch.setattr(Log, "metrics", lambda *_: signal.raise_signal(signal.SIGINT))
    assert short_run("training.max_iters=3").code == 130


# --- Bugs of ours -------------------------------------------------------------------------------


def test_a_type_error_keeps_its_traceback(short_run, monkeypatch):
    monkeypatch.setattr(train.Run, "due", lambda run: True)
    with pytest.raises(TypeError):
        short_run()


def test_a_value_error_from_within_torch_keeps_its_traceback(short_run, monkeypatch):
    monkeypatch.setattr(train, "estimate", lambda *_, **__: torch.optim.SGD([]))
    with pytest.raises(ValueError, match="empty parameter list"):
        short_run("training.eval_interval=1")


def test_an_error_of_shapes_in_our_own_code_keeps_its_traceback(short_run, monkeypatch):
    monkeypatch.setattr(model, "rope_tables", lambda *_: 2 * [torch.ones(32, 1, 6)])
    with pytest.raises(RuntimeError, match="size of tensor"):
        short_run()


def test_a_value_error_of_a_builtin_in_our_own_code_keeps_its_traceback(run, trained, monkeypatch):
    monkeypatch.setattr(texts, "windows", lambda *_: [(0, 5, 0, "one too many")])
    with pytest.raises(ValueError, match="unpack"):
        run("eval.py", f"checkpoint={trained}/ckpt.pt", "system.device=cpu")
