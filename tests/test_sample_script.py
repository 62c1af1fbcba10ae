"""sample.py: prompts with holes, files of prompts, windows, EOS, its output file, and watching."""

import json
import re
import sys

import pytest
from conftest import TEXT

import sample
from nanomdm.tokenizers import ByteTokenizer, CharTokenizer

CPU = "system.device=cpu"
CONTEXT = 32  # of the tiny model


@pytest.fixture
def texts(run, trained):
    """texts("key=value", ...): the samples that sample.py prints for the tiny model."""

    def texts(*words: str) -> list[str]:
        words = (f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", CPU, *words)
        result = run("sample.py", *words)
        assert result.code == 0, result.err
        parts = re.split(r"--- sample \d+ ---\n", result.out)
        return [part.removesuffix("\n") for part in parts[1:] or parts]

    return texts


@pytest.fixture
def prompt_file(tmp_path):
    """prompt_file("one", "two", ...): the setting that names a file of these lines."""

    def prompt_file(*lines: str) -> str:
        (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
        return f"prompt_file={tmp_path}/prompts.txt"

    return prompt_file


# --- Holes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("KING:", ["KING:"]),
        ("", [""]),
        ("a[MASK]b", ["a", 1, "b"]),
        ("[MASK*12]", ["", 12, ""]),
        ("[MASK][MASK*2] c", ["", 1, "", 2, " c"]),
        (r"a \[MASK] b", ["a [MASK] b"]),
        (r"a \[MASK*3] b[MASK]", ["a [MASK*3] b", 1, ""]),
        (r"a \\[MASK] b", ["a \\", 1, " b"]),
        (r"\\\[MASK]", [r"\[MASK]"]),
        (r"C:\new \\ [mask] [MASK *2] [MASK*]", [r"C:\new \\ [mask] [MASK *2] [MASK*]"]),
    ],
)
def test_a_prompt_is_read_as_texts_and_holes(prompt, pieces):
    assert sample.parse(prompt) == pieces


def test_holes_are_filled_and_what_is_around_them_stays(texts):
    (text,) = texts("prompt=KING [MASK]:\nThe [MASK*6] and")
    assert re.fullmatch(r"KING .:\nThe .{6} and", text, flags=re.S)


def test_a_hole_may_be_the_whole_prompt(texts):
    assert len(texts("prompt=[MASK*9]")[0]) == 9


def test_a_prompt_without_holes_is_a_beginning_as_before(texts):
    (text,) = texts("prompt=KING 3:")
    assert text.startswith("KING 3:") and len(text) == CONTEXT


# --- Files of prompts ---------------------------------------------------------------------------


def test_every_line_of_a_prompt_file_is_a_prompt(texts, prompt_file):
    prompts = ["KING", "The rose of roses, and", "", "s"]
    found = texts(prompt_file(*prompts))
    assert [len(text) for text in found] == [CONTEXT] * 3  # a blank line is none
    assert all(text.startswith(p) for text, p in zip(found, filter(None, prompts), strict=True))


def test_every_prompt_gets_as_many_samples_as_asked_for(texts, prompt_file):
    found = texts(prompt_file("KING", "The"), "num_samples=3")
    assert [text[:3] for text in found] == ["KIN"] * 3 + ["The"] * 3 and len(set(found)) == 6


@pytest.mark.parametrize("strategy", ["stochastic", "remask", "eb"])
def test_a_text_of_a_batch_does_not_depend_on_the_others(texts, prompt_file, strategy):
    """At temperature 1, whatever the lengths of the others; the second prompt is row 1 in both."""
    words = ["sampling.temperature=1.0", f"sampling.strategy={strategy}", "sampling.length=24"]
    first = texts(prompt_file("KING 1:", "The rose", "s and 5"), *words)
    other = texts(prompt_file("The sword of swords,", "The rose"), *words)
    assert first[1] == other[1]
    assert first[0] == texts("prompt=KING 1:", *words)[0]


def test_texts_of_different_lengths_come_in_the_order_of_their_prompts(texts, prompt_file):
    prompts = ["K[MASK*3]", "Th[MASK*9]", "s[MASK*3]", "K[MASK*20]", "T[MASK*10]"]
    found = texts(prompt_file(*prompts))
    assert [(text[0], len(text)) for text in found] == [
        ("K", 4), ("T", 11), ("s", 4), ("K", 21), ("T", 11),
    ]  # fmt: skip


def test_a_hole_is_filled_alone_as_it_is_beside_a_longer_text(texts, prompt_file):
    alone = texts(prompt_file("KING", "The [MASK*9] of"))
    beside = texts(prompt_file("KING[MASK*5]", "The [MASK*9] of", "s[MASK*11]"))
    assert alone[1] == beside[1]


def test_the_batch_size_changes_no_text(texts):
    assert texts("num_samples=5", "sampling.batch_size=2") == texts("num_samples=5")


# --- Beyond the context -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["stochastic", "first_hitting", "entropy", "remask"])
def test_a_text_may_be_longer_than_the_context(texts, strategy):
    (text,) = texts("prompt=KING", "sampling.length=90", f"sampling.strategy={strategy}")
    assert text.startswith("KING") and len(text) == 90


def test_a_long_text_begins_like_a_short_one(texts):
    assert texts("sampling.length=90")[0].startswith(texts()[0])


def test_a_prompt_may_be_longer_than_the_context_of_a_longer_text(texts):
    (text,) = texts(f"prompt={TEXT[:70]}", "sampling.length=80")
    assert text.startswith(TEXT[:70]) and len(text) == 80


def test_a_prompt_with_holes_may_be_longer_than_the_context(texts):
    (text,) = texts(f"prompt={TEXT[:50]}[MASK*8]{TEXT[58:90]}")
    assert (text[:50], text[58:]) == (TEXT[:50], TEXT[58:90])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 49, 100])
@pytest.mark.parametrize("context", [1, 2, 3, 32])
def test_windows_cover_the_text_and_each_keeps_half_of_the_one_before(length, context):
    windows = sample.windows(length, context)
    ends = [min(window.stop, length) for window in windows]
    assert windows[0].start == 0 and ends[-1] == length
    assert all(window.stop - window.start == context for window in windows)
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.stop - after.start >= context // 2 and before.stop < after.stop


# --- EOS ----------------------------------------------------------------------------------------


@pytest.fixture
def newline_ends(monkeypatch):
    """The tokenizer of the tiny model, as if a newline were its EOS."""
    characters = "".join(sorted(set(TEXT)))
    monkeypatch.setattr(CharTokenizer, "eos", characters.index("\n"))


def test_eos_ends_a_text(texts, newline_ends, monkeypatch):
    short = texts("num_samples=20", "sampling.length=60")
    monkeypatch.setattr(CharTokenizer, "eos", None)
    long = texts("num_samples=20", "sampling.length=60")
    assert any(len(text) < 32 for text in short)
    for ended, whole in zip(short, long, strict=True):
        assert "\n" not in ended and whole.startswith(ended)


def test_eos_in_the_prompt_ends_nothing(texts, newline_ends):
    (text,) = texts("prompt=KING\nKING[MASK*3]\nThe [MASK*4] of")
    assert re.fullmatch(r"KING\nKING.{3}\nThe .{4} of", text, flags=re.S)


def test_texts_that_have_ended_cost_no_more_calls(texts, newline_ends, tmp_path):
    texts("prompt=KING", "sampling.length=2000", f"sampling.output={tmp_path}/o.jsonl")
    record = json.loads((tmp_path / "o.jsonl").read_text())
    assert len(record["tokens"]) < 1000 and record["calls"] < 6 * len(record["tokens"])


# --- The output file ----------------------------------------------------------------------------


def test_the_output_holds_one_object_a_sample(texts, prompt_file, tmp_path):
    printed = texts(
        prompt_file("KING", "The [MASK*7]"), "num_samples=2", "sampling.strategy=confidence",
        f"sampling.output={tmp_path}/deep/o.jsonl", "system.seed=5",
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "deep/o.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == printed
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    for number, record in enumerate(records, start=1):
        assert record["sample"] == number and record["prompt"] in ("KING", "The [MASK*7]")
        assert tokenizer.decode(record["tokens"]) == record["text"]
        assert (record["seed"], record["strategy"]) == (5, "confidence")
        assert record["label"] == "heuristic" and record["calls"] == 6 and record["seconds"] > 0


def test_an_earlier_output_is_kept(texts, tmp_path):
    (tmp_path / "o.jsonl").write_text("precious")
    texts(f"sampling.output={tmp_path}/o.jsonl")
    assert (tmp_path / "o-1.jsonl").read_text() == "precious"


# --- Watching -----------------------------------------------------------------------------------


def screen(written: str) -> str:
    """What a terminal shows in the end, of text that moves up, clears and has colours."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*(?:;\d+)*[A-Za-z]|\n|\r|[^\x1b\n\r]+", written):
        if part == "\n":
            row += 1
            lines[row:] = lines[row:] or [""]
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return "\n".join(lines)


@pytest.fixture
def watched(texts, monkeypatch, capfd):
    """watched("key=value", ...): all that is written to a terminal of 20 columns and 9 lines."""

    def watched(*words: str) -> str:
        monkeypatch.setattr(sample, "FRAME", 0.0)
        monkeypatch.setenv("COLUMNS", "20")
        monkeypatch.setenv("LINES", "9")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return "\n".join(texts("sampling.watch=true", *words))

    return watched


def test_a_watched_text_is_on_the_screen_once_in_the_end(watched, texts):
    assert screen(watched("prompt=KING").lstrip("\n")).strip("\n") == texts("prompt=KING")[0].strip(
        "\n"
    )


def test_a_watched_text_shows_its_masks_and_what_is_new(watched):
    written = watched("prompt=KING 1", "sampling.strategy=confidence")
    frames = written.split("\x1b[J")
    masks = [frame.count("░") for frame in frames[:-1]]
    assert masks[0] > 0 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
    assert all(sample.NEW in frame for frame in frames[:-1])


def test_a_tall_text_stays_within_the_screen(watched):
    frames = watched("sampling.length=400").split("\x1b[J")[:-1]
    assert max(frame.count("\n") for frame in frames) <= 9


def test_nothing_is_shown_when_piped(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", CPU)
    plain, piped = run("sample.py", *words), run("sample.py", *words, "sampling.watch=true")
    assert piped.out == plain.out and "no terminal" in piped.err


def test_control_characters_never_reach_the_terminal():
    tokenizer = ByteTokenizer()
    shown = sample.styled(tokenizer, list(b"a\x1b[2Jb\x07\nc"), set(), mask_id=256)
    assert "".join(character for character, _ in shown) == "a·[2Jb·\nc"


def test_a_frame_has_no_line_longer_than_the_terminal():
    characters = [(c, sample.PLAIN) for c in "abcdefgh\nij"]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in sample.wrap(iter(characters), 3)]
    assert plain == ["abc", "def", "gh", "ij"]


def test_canvases_of_one_length_share_a_batch_whatever_their_prompts(texts, prompt_file, tmp_path):
    words = ("sampling.strategy=first_hitting", f"sampling.output={tmp_path}/o.jsonl")
    texts(prompt_file("KING", "The rose of roses", "s"), *words)
    calls = [json.loads(line)["calls"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert calls == [CONTEXT - 1] * 3  # those of the row with the most holes


def test_the_label_is_told_on_stderr(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", CPU)
    assert "first_hitting (any-order exact)" in run(
        "sample.py", *words, "sampling.strategy=first_hitting"
    ).err  # fmt: skip
