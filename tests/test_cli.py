"""The command line: any text arrives as it is, and a mistake is answered in one line."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import READS, ROOT, SCRIPTS, TINY, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import model
import train
from nanomdm import cli, texts
from nanomdm.runlog import Log

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
            patch.setitem(READS, "train.py", ())
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
    assert composed(by_key) == by_key


def test_prompts_paths_and_names_are_free_text():
    keys = {"prompt", "prompt_file", "checkpoint", "out_dir", "output", "data.path", "data.dir"}
    others = {"training.init_from", "eval.against", "logging.project", "logging.name"}
    assert set(FREE_TEXT) == keys | others


@pytest.mark.parametrize("key", ["prompt", "+prompt", "++prompt", "data.path", "data.dir"])
def test_free_text_reaches_the_script_as_it_is(configure, key):
    [(config, explicit)] = configure(f"{key}={MEANINGFUL}")
    assert get(config, key.lstrip("+")) == MEANINGFUL and explicit == {key.lstrip("+")}


def test_free_text_reaches_the_jobs_of_a_sweep_as_it_is(configure):
    calls = configure("-m", f"prompt={MEANINGFUL}", "num_samples=1,2")
    assert [config["prompt"] for config, _ in calls] == [MEANINGFUL] * 2


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("""prompt="What's in a name?" """, "What's in a name?"),
        ("""prompt='${y} \\${y} $HOME "{}" \\'""", '${y} \\${y} $HOME "{}" \\'),
        ("""prompt=To\\ be,\\ or\\ not='[\n\t🦜]~'""", "To be, or not=[\n\t🦜]~"),
    ],
    ids=["double quotes", "single quotes", "backslashes"],
)
def test_free_text_typed_into_a_shell_arrives_as_it_is(typed, text, tmp_path):
    show = "from nanomdm import cli; cli.main(lambda config: print(ascii(config.prompt)))"
    (tmp_path / "show.py").write_text(show)
    command = f"'{sys.executable}' show.py {typed}"
    output = subprocess.check_output(command, shell=True, cwd=tmp_path, env=environment())
    assert output.decode() == f"{ascii(text)}\n"


def test_a_sample_begins_with_the_prompt_that_was_typed_into_a_shell(trained, tmp_path):
    prompt = "KING 4, 5: The crown,\nand"
    command = f"""'{sys.executable}' '{ROOT}/sample.py' checkpoint='{trained}/ckpt.pt' \
        sampling.steps=2 prompt="{prompt}" """
    env = environment(OMP_NUM_THREADS="1")
    output = subprocess.check_output(command, shell=True, cwd=tmp_path, env=env)
    assert output.decode().startswith(prompt)


def test_an_argument_that_is_not_utf_8_is_refused(refusal):
    assert "UTF-8" in refusal("prompt=caf\udce9")


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
        *("model.n_layer =3", "training.max_iters=${nope}", "logging.tags=[a"),
    ],
)
def test_what_hydra_cannot_read_is_answered_in_one_line_with_the_key(refusal, word):
    assert word.split("=")[0] in refusal(word)


# --- Values -------------------------------------------------------------------------------------

ILL_TYPED = {
    "true or false": ["logging.wandb=yes", "logging.wandb=1", "sampling.watch="],
    "a whole number": [
        *("model.n_layer=2.5", "model.n_layer=four", "model.n_layer=true", "model.n_layer="),
        *("model.n_layer=null", "model.n_layer=[1]", "model.n_layer={x: 1}"),
        *("model.n_layer=1e400", "system.seed=nan"),
    ],
    "a number": ["model.dropout=x", "model.dropout=true", "model.dropout=nan", "model.dropout="],
    "a list": ["logging.tags=x", "logging.tags=null", "logging.tags={a:b}", "logging.tags="],
    "a section": ["sampling.options=3", "sampling.options=x"],
}


@pytest.mark.parametrize(
    ("kind", "word"), [(kind, word) for kind, words in ILL_TYPED.items() for word in words]
)
def test_a_value_of_another_type_is_answered_with_the_type(refusal, kind, word):
    line = refusal(word)
    assert line.startswith(word.split("=")[0]) and f" is not {kind}" in line


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


def test_experiments_can_be_swept_over(configure):
    calls = configure("-m", f"experiment={','.join(EXPERIMENTS)}")
    assert len({repr(config) for config, _ in calls}) == len(EXPERIMENTS)


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
    monkeypatch.setattr(model, "rope_tables", lambda *_: (torch.ones(32, 3), torch.ones(32, 3)))
    with pytest.raises(RuntimeError, match="size of tensor"):
        short_run()


def test_a_value_error_of_a_builtin_in_our_own_code_keeps_its_traceback(run, trained, monkeypatch):
    monkeypatch.setattr(texts, "windows", lambda *_: [(0, 5, 0, "one too many")])
    with pytest.raises(ValueError, match="unpack"):
        run("eval.py", f"checkpoint={trained}/ckpt.pt", "system.device=cpu")
