"""Rows that are no windows of a stream: documents that end, prompts with answers, grids."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET, TINY, load_model
from hypothesis import given
from hypothesis import strategies as st

import data
import diffusion
import train as train_script
from data import open_bins
from nanomdm import bounds, checkpoint, cli, prompts, runs, strategies, text, texts
from nanomdm.errors import UserError
from nanomdm.tokenizers import ByteTokenizer, CharTokenizer, IdTokenizer, load_tokenizer

PAIRS = [("ab", "ba"), ("abc", "cba"), ("c", "c"), ("", "ab"), ("ca", "ac")]
TOKENIZER = CharTokenizer("abc", ends=True)  # its end token is 3
END, L = 3, 9


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(pairs, length: int = L) -> data.Rows:
    pieces = [piece for pair in pairs for piece in pair]
    return data.Rows(texts.encode(pieces, "pairs", TOKENIZER), length, "pairs", TOKENIZER)


# --- Tokens that end a document -----------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, ByteTokenizer(ends=True), IdTokenizer(11, ends=True)]
)
def test_the_end_token_is_the_last_one_and_stands_for_no_text(tokenizer):
    word = "3 5 " if isinstance(tokenizer, IdTokenizer) else "abc"
    ids = tokenizer.encode(word).tolist()
    assert tokenizer.eos == tokenizer.vocab_size - 1 and tokenizer.eos not in ids
    assert tokenizer.decode([*ids, tokenizer.eos]) == word
    assert load_tokenizer(tokenizer.state()).state() == tokenizer.state()


def test_checkpoints_of_earlier_versions_have_tokenizers_without_an_end():
    state = {"kind": "char", "characters": "ab"}
    assert (load_tokenizer(state).eos, load_tokenizer(state).vocab_size) == (None, 2)
    assert load_tokenizer({"kind": "byte"}).vocab_size == 256


# --- What is found ------------------------------------------------------------------------------


def test_a_jsonl_of_texts_holds_documents_and_a_text_file_one_stream(tmp_path):
    documents = jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "text": "a"}, {"text": "b\nc"}])
    (tmp_path / "b.txt").write_text("one\ntwo")
    found = [text.read(path) for path in (documents, tmp_path / "b.txt", tmp_path)]
    assert [content.layout for content in found] == ["documents", "stream", "documents"]
    assert [content.texts for content in found] == [["a", "b\nc"], ["one\ntwo"],
                                                    ["a", "b\nc", "one\ntwo"]]  # fmt: skip


def test_a_jsonl_of_prompts_and_responses_holds_pairs(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": p, "response": r} for p, r in PAIRS])
    content = text.read(path)
    assert content.layout == "pairs"
    assert content.texts == [piece for pair in PAIRS for piece in pair]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, 'line 2: expected .* "prompt" and a "response" field'),
        ({"text": "a"}, 'line 2: expected .* "prompt" and a "response" field'),
        ({"prompt": "a", "response": ""}, "line 2: the response is empty"),
        ({"prompt": "a", "response": 7}, 'line 2: expected .* "response" field'),
    ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_number(row, message, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, row])
    with pytest.raises(UserError, match=message):
        text.read(path)


def test_pairs_beside_other_texts_and_pairs_as_rows_are_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r"holds pairs: leave out data\.rows"):
        text.read(path, rows=True)
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(UserError, match=r"holds pairs: .* files without pairs"):
        text.read(tmp_path)


def test_rows_are_the_lines_of_all_files(tmp_path):
    (tmp_path / "b.txt").write_text("12\n\n34\n")
    jsonl(tmp_path / "a.jsonl", [{"text": "56"}, {"text": "78\n90"}])
    content = text.read(tmp_path, rows=True)
    assert (content.layout, content.texts) == ("rows", ["56", "78", "90", "12", "34"])


# --- Splits and ids -----------------------------------------------------------------------------


def content(layout: str, pieces: list[str]) -> text.Content:
    return text.Content("mine", layout, [("mine", pieces)])


@pytest.mark.parametrize(
    ("layout", "pieces", "train"),
    [
        ("stream", ["x" * 10], ["x" * 9]),
        ("documents", ["x"] * 10, ["x"] * 9),
        ("documents", ["x" * 9, "y"], ["x" * 9]),
        ("rows", ["xy"] * 20, ["xy"] * 18),
        ("pairs", ["p", "r"] * 10, ["p", "r"] * 9),
        ("pairs", ["", "r", "p", "r"], ["", "r"]),
    ],
)
def test_a_tenth_is_for_validation_and_no_document_pair_or_row_is_cut(layout, pieces, train):
    found, val = texts.split_texts(content(layout, pieces))
    assert found == train
    assert val == (["x"] if layout == "stream" else pieces[len(train) :])


def test_a_document_longer_than_a_tenth_of_all_is_cut_and_has_its_end_in_the_other_part(tmp_path):
    pieces = ["a", "b" * 90, "c" * 9]
    train, val = texts.split_texts(content("documents", pieces))
    assert (train, val) == (["a", "b" * 89], ["b", "c" * 9])
    corpus = data.prepare(content("documents", pieces), "char", 0, tmp_path)
    assert corpus.train.tolist() == [1, 4, *[2] * 89] and corpus.tokenizer.eos == 4
    assert corpus.val.tolist() == [2, 4, *[3] * 9, 4]


def test_an_end_token_follows_each_document_and_each_part_of_a_pair_but_no_row():
    for layout, expected in (("documents", [0, 1, END, 2, END]), ("pairs", [0, 1, END, 2, END])):
        assert texts.encode(["ab", "c"], layout, TOKENIZER).tolist() == expected
    assert texts.encode(["ab", "ca"], "rows", TOKENIZER).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("char", ["abcd"] * 9 + ["ab"]),
        ("ids", ["1 2 3"] * 9 + ["1 2"]),
        ("char", ["ab"] * 9 + ["a"]),
    ],
)
def test_a_row_of_another_length_is_found_in_the_other_split_too(kind, lines, tmp_path):
    with pytest.raises(UserError, match=r"row 10 has \d tokens, not \d: one length"):
        data.prepare(content("rows", lines), kind, 9, tmp_path)


def test_a_bpe_learns_from_rows_one_by_one_and_says_why_they_do_not_fit(tmp_path):
    pytest.importorskip("tokenizers")
    lines = [f"{n:036d}" for n in range(20_000)]
    with pytest.raises(UserError, match=r"which are characters with data\.tokenizer=char"):
        data.prepare(content("rows", lines), "bpe", 300, tmp_path)


@pytest.mark.parametrize(
    ("rows", "text", "says"),
    [("true", "\n\n", "no line with text: name another"), ("false", "", "is empty: leave it out")],
)
def test_a_file_of_empty_lines_is_refused(rows, text, says, run, tmp_path):
    (tmp_path / "blank.txt").write_text(text)
    result = run("train.py", *TINY, "data.path=blank.txt", f"data.rows={rows}")
    assert result.code == 2 and "blank.txt" in result.err and says in result.err


def test_documents_of_an_earlier_versions_run_are_the_stream_that_they_were(tmp_path):
    """Whose tokenizer may have had an end token, as GPT-2's."""
    texts_ = content("documents", ["ab", "ba"] * 9)
    stream = texts_.for_tokenizer(TOKENIZER, content("stream", [texts_.text]).sha256)
    assert stream.layout == "stream" and stream.texts == ["\n".join(["ab", "ba"] * 9)]
    assert texts_.for_tokenizer(TOKENIZER, texts_.sha256).layout == "documents"


def test_rows_of_unequal_length_are_refused_with_the_number_of_the_first():
    with pytest.raises(UserError, match="row 3 has 1 tokens, not 2"):
        texts.encode(["ab", "ca", "b"], "rows", TOKENIZER)


def test_a_text_that_a_tokenizer_of_ones_own_cannot_encode_is_refused():
    class Latin1(ByteTokenizer):
        def encode(self, text):
            return np.frombuffer(text.encode("latin-1"), np.uint8).astype(np.int64)

    with pytest.raises(UserError, match="'latin-1' codec can't encode character"):
        texts.encode(["ab", "\N{SNOWMAN}"], "stream", Latin1())


def test_documents_need_a_tokenizer_that_can_end_them():
    with pytest.raises(UserError, match=r"data\.tokenizer=char has no end token"):
        texts.encode(["ab", "c"], "documents", CharTokenizer("abc"))


# --- Rows ---------------------------------------------------------------------------------------


def test_a_pair_is_prompt_end_answer_and_ends_up_to_the_rows_length():
    row = rows_of(PAIRS)[1]
    assert row.ids.tolist() == [0, 1, 2, END, 2, 1, 0, END, END]
    assert row.predict.tolist() == [False] * 4 + [True] * 5
    assert row.count == 4  # the answer and one end token


def test_a_pair_without_a_prompt_predicts_everything_behind_the_end_of_the_empty_prompt():
    row = rows_of(PAIRS)[3]
    assert row.ids.tolist() == [END, 0, 1] + [END] * 6 and row.count == 3
    assert row.predict.tolist() == [False] + [True] * 8


@given(
    st.lists(
        st.tuples(st.text("abc", max_size=4), st.text("abc", min_size=1, max_size=4)),
        min_size=1, max_size=12,
    ),
    st.integers(3, 10),
)  # fmt: skip
def test_any_pairs_come_back_as_they_were_but_for_those_that_are_too_long(pairs, length):
    rows = rows_of(pairs, length)
    fits = [pair for pair in pairs if len("".join(pair)) + 2 <= length]
    found = []
    for row in rows.evenly():
        first = int(row.predict.int().argmax())
        answer = row.ids[first : first + row.count]
        assert answer[-1] == END and (row.ids[first + row.count :] == END).all()
        assert len(row.ids) == length and row.ids[first - 1] == END
        found.append((TOKENIZER.decode(row.ids[:first]), TOKENIZER.decode(answer)))
    assert found == fits and rows.left_out == len(pairs) - len(fits)


def test_a_row_of_a_grid_never_begins_within_another():
    tokens = np.arange(40, dtype=np.uint16) % 10
    rows = data.Rows(tokens, 10, "rows", IdTokenizer(10), overlap=True)
    x0, predict = rows.batch(64, torch.Generator().manual_seed(0))
    assert len(rows) == 4 and predict.all() and torch.equal(x0, torch.arange(10).expand(64, 10))


# --- The loss and the bound of an answer --------------------------------------------------------


def masked_costs(xt, x0, is_masked):
    """Each masked token costs its id + 1."""
    return torch.where(is_masked, x0 + 1.0, 0.0)


def test_the_loss_counts_the_answer_alone_and_never_masks_a_prompt():
    row, seen = rows_of(PAIRS)[0], []

    def nll(xt, x0, is_masked):
        seen.append((xt, is_masked))
        return masked_costs(xt, x0, is_masked)

    x0, predict = row.ids.expand(20000, -1), row.predict.expand(20000, -1)
    loss = diffusion.masked_diffusion_loss(
        None, x0, mask_id=4, generator=torch.Generator().manual_seed(1), predict=predict, nll=nll
    )
    ((xt, is_masked),) = seen
    assert not is_masked[~predict].any() and torch.equal(xt[~predict], x0[~predict])
    expected = (row.ids[row.predict] + 1.0).mean()  # over the answer and all ends
    assert float(loss) == pytest.approx(float(expected), rel=0.05)


def test_a_row_whose_prompt_is_long_counts_as_much_as_one_whose_prompt_is_short():
    x0, costs = torch.zeros(2, 4).long(), torch.tensor([[0.0, 0, 0, 4], [1, 1, 1, 1]])
    predict = torch.tensor([[False, False, False, True], [True] * 4])
    found = [
        diffusion.masked_diffusion_loss(
            None, x0, mask_id=1, weighting=0.0, predict=where, nll=lambda *inputs: costs
        )
        for where in (predict, None)
    ]
    assert found == [2 * (4 + 1) / 2, 2 * 1.0]  # 2 - weighting is a factor


def test_the_bound_of_an_answer_is_that_of_the_conditional_law_by_its_own_tokens():
    """An exact denoiser of answers that are one of two with equal probability: ln 2 nats."""
    answers = torch.tensor([[END, 0, 1, END, END], [END, 1, 0, END, END]])

    def nll(xt, x0, is_masked):
        shown = torch.where(is_masked, -1, x0)
        fits = ((shown[:, None] == answers) | (shown[:, None] == -1)).all(-1).double()  # (B, 2)
        p = (fits[:, :, None] * (answers == x0[:, None])).sum(1) / fits.sum(1, keepdim=True)
        return torch.where(is_masked, -p.log(), 0.0)

    rows = [data.Row(ids, torch.arange(5) > 0, 3) for ids in answers]
    found = diffusion.estimate(
        diffusion.any_order, nll, [row.ids for row in rows], mask_id=4, draws=4000,
        predict=[row.predict for row in rows], generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    samples = bounds.NLLSamples(*found).counting([row.count for row in rows])
    value, error = samples.bound()
    assert value == pytest.approx(math.log(2) / 3, abs=4 * error) and error < 0.01
    assert samples.tokens == 6  # of each answer two tokens and one end


# --- Prompts ------------------------------------------------------------------------------------


def test_a_documents_canvas_begins_where_a_document_begins():
    canvas = prompts.make_canvas("ab", 5, TOKENIZER, 9, "documents")
    assert canvas.ids.tolist() == [END, 0, 1, 0, 0, 0] and canvas.start == 1
    assert canvas.is_masked.tolist() == [False] * 3 + [True] * 3


def test_a_canvas_for_an_answer_has_the_prompt_its_end_and_masks():
    canvas = prompts.make_canvas("ab", 0, TOKENIZER, 6, "pairs")
    assert canvas.ids.tolist() == [0, 1, END, 0, 0, 0] and canvas.start == 3
    assert canvas.is_masked.tolist() == [False] * 3 + [True] * 3


def test_a_prompt_that_is_to_be_answered_has_no_blanks():
    with pytest.raises(UserError, match="answers prompts, which have no blanks"):
        prompts.make_canvas("a[MASK]", 0, TOKENIZER, 6, "pairs")


@pytest.mark.parametrize("layout", ["rows", "pairs"])
def test_rows_and_pairs_have_one_length(layout):
    for length in (0, 6):
        assert len(prompts.make_canvas("ab", length, TOKENIZER, 6, layout).ids) == 6
    with pytest.raises(UserError, match=f"checkpoint's {layout} have 6 tokens: leave it out"):
        prompts.make_canvas("ab", 7, TOKENIZER, 6, layout)
    if layout == "rows":
        with pytest.raises(UserError, match="prompt has 5 tokens, and the checkpoint's rows have"):
            prompts.make_canvas("ab[MASK*3]", 0, TOKENIZER, 6, layout)


def test_characters_that_are_blanks_stand_for_one_mask_each():
    [line] = prompts.with_blanks(["a..b_."], "._")
    assert line == "a[MASK*2]b[MASK*2]"
    canvas = prompts.make_canvas(line, 0, TOKENIZER, 6, "rows")
    assert canvas.is_masked.tolist() == [False, True, True, False, True, True]
    assert prompts.with_blanks(["a..b"], "") == ["a..b"]


@pytest.mark.parametrize(
    ("line", "blank", "expected"),
    [
        ("1.[MASK*10].", ".", "1[MASK][MASK*10][MASK]"),
        ("10[MASK*10]00", "0", "1[MASK][MASK*10][MASK*2]"),
        (r"a\.b.", ".", "a.b[MASK]"),
        (r"\[MASK].", ".", r"\[MASK][MASK]"),
        ("a-]^b", "]^-", "a[MASK*3]b"),
    ],
)
def test_blanks_leave_other_blanks_and_kept_characters_alone(line, blank, expected):
    [found] = prompts.with_blanks([line], blank)
    assert found.replace("[MASK*1]", "[MASK]") == expected


def test_a_prompt_that_leaves_nothing_to_fill_is_refused():
    for layout, longest in (("documents", "abcab"), ("pairs", "abcab")):
        with pytest.raises(UserError, match="nothing is left to fill, shorten the prompt"):
            prompts.make_canvas(longest, 0, TOKENIZER, 6, layout)
        assert prompts.make_canvas(longest[:-1], 0, TOKENIZER, 6, layout).is_masked.sum() == 1


def test_the_length_of_a_document_does_not_count_the_token_that_it_begins_with():
    canvas = prompts.make_canvas("ab", 4, TOKENIZER, 9, "documents")
    assert len(canvas.ids) - canvas.start == 4


# --- The whole way ------------------------------------------------------------------------------

LEARN = (*TINY, *QUIET, "training.max_iters=400", "training.batch_size=16", "logging.interval=100")
WORDS = sorted({f"{i:b}".translate({48: "a", 49: "b"}) for i in range(4, 64)})  # aba and so on


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """The folder of a run that has learnt to turn words around, and the file of its pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    path = jsonl(folder / "p.jsonl", [{"prompt": w, "response": w[::-1]} for w in WORDS * 3])
    train(folder, f"data.path={path}", "model.block_size=16")
    return folder / "out", path


def train(folder: Path, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *LEARN, *words, "out_dir=out"])
        cli.main(train_script.main)


GREEDY = ("sampling.temperature=0", "sampling.strategy=confidence", "system.device=cpu")


def answers(run, folder: Path, *words: str) -> list[str]:
    found = run("sample.py", f"checkpoint={folder}/ckpt.pt", "output=o.jsonl", *GREEDY, *words)
    assert found.code == 0, found.err
    return [json.loads(line)["text"] for line in Path("o.jsonl").read_text().splitlines()]


def test_a_prompt_is_answered_and_the_answer_ends(answering, run):
    assert answers(run, answering[0], "prompt=bbaaa") == ["aaabb"]


def test_unequal_prompts_in_a_batch_are_answered_as_each_alone(answering, run, tmp_path):
    asked = ["abb", "babaa", "b", "aabbab"]
    (tmp_path / "p.txt").write_text("\n".join(asked))
    together = answers(run, answering[0], "prompt_file=p.txt", "sampling.temperature=1")
    for number, prompt in enumerate(asked):
        lines = [*["a"] * number, prompt]  # the same row of the batch
        (tmp_path / "q.txt").write_text("\n".join(lines))
        alone = answers(run, answering[0], "prompt_file=q.txt", "sampling.temperature=1")
        assert alone[-1] == together[number]


def test_eval_counts_the_answers_tokens_and_one_end_and_finds_exact_answers(answering, run):
    out, path = answering
    words = (f"checkpoint={out}/ckpt.pt", "output=f.json", "system.device=cpu")
    words += (f"data.path={path}", "eval.draws=2")
    result = run("eval.py", *words)
    assert result.code == 0, result.err
    figures = json.loads(Path("f.json").read_text())
    assert figures["tokens"] == 3 * sum(len(word) + 1 for word in WORDS)
    (matches,) = figures["matches"]
    assert f"exact answers at temperature 0, confidence: {matches['share']:.1%} of" in result.out
    (Path("all.txt")).write_text("\n".join(WORDS))
    found = answers(run, out, "prompt_file=all.txt")
    right = np.mean([a == word[::-1] for a, word in zip(found, WORDS, strict=True)])
    assert matches["share"] == pytest.approx(right) and right > 0.5
    wrong = jsonl(Path("w.jsonl"), [{"prompt": w, "response": w[::-1] + "a"} for w in WORDS])
    assert run("eval.py", *words, f"data.path={wrong}", "output=w.json").code == 0
    (matches,) = json.loads(Path("w.json").read_text())["matches"]
    assert matches["texts"] == len(WORDS) and matches["share"] < 0.1  # possible, but never written
    assert run("eval.py", *words, "eval.samplers=[margin]", "sampling.steps=16").code == 0
    (row,) = json.loads(Path("f.json").read_text())["samplers"]
    loaded, pairs = load_model(out / "ckpt.pt"), [(w, w[::-1]) for w in WORDS * 3]
    rows = data.Rows(
        texts.encode([piece for pair in pairs for piece in pair], "pairs", loaded.tokenizer),
        16, "pairs", loaded.tokenizer,
    ).evenly()  # fmt: skip
    x0, predict = torch.stack([r.ids for r in rows]), torch.stack([r.predict for r in rows])
    nats = diffusion.score(
        loaded.model, x0, is_masked=predict, mask_id=loaded.model.config.mask_id,
        strategy=strategies.margin, steps=16,
    )  # fmt: skip
    assert row["value"] == pytest.approx(float(nats.sum()) / figures["tokens"], rel=1e-4)


def test_the_log_of_a_run_on_pairs_shows_an_answer_and_the_bound_of_answers(answering, run):
    result = run("train.py", *TINY, f"data.path={answering[1]}", "model.block_size=16")
    samples = re.findall(r"--- sample after \d+ steps ---\n(.*)\n", result.out)
    assert len(samples) == 2 and all(re.match("[ab]+ -> ", sample) for sample in samples)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    logged = [line["eval/val_loss"] for line in lines if "eval/val_loss" in line][-1]
    stored = cli.stored_data(checkpoint.load("out/ckpt.pt")["config"])
    rows = len(data.load(stored).rows("val", 16))
    draws = f"eval.draws={-(-bounds.LEAST_ROWS // rows)}"  # as many as the log's bound has
    assert f"loss {logged:.4f} ± " in run("eval.py", draws, *GREEDY[2:]).out


@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_pairs_train_the_same_in_micro_batches(objective, answering, run):
    words = [*TINY, f"data.path={answering[1]}", "model.block_size=16", "out_dir=one"]
    words.append(f"training.objective={objective}")
    assert run("train.py", *words).code == 0
    assert run("train.py", *words[:-2], words[-1], "out_dir=two", "training.grad_accum=4").code == 0
    one, two = (load_model(f"{name}/ckpt.pt").state["model"] for name in ("one", "two"))
    for name, weight in one.items():
        assert torch.allclose(weight, two[name], atol=1e-4), name


def test_a_run_on_pairs_goes_on_as_if_never_interrupted(answering, run, monkeypatch):
    words = [*TINY, f"data.path={answering[1]}", "model.block_size=16"]
    assert run("train.py", *words, "out_dir=whole").code == 0
    step = train_script.training_step

    def dies(training):
        if training.step == 9:
            raise KeyboardInterrupt
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "training_step", dies)
        assert run("train.py", *words, "out_dir=cut").code == 130
    assert checkpoint.load("cut/ckpt.pt")["step"] == 6
    assert run("train.py", "out_dir=cut", "training.resume=true").code == 0
    whole, cut = (load_model(f"{name}/ckpt.pt").state["model"] for name in ("whole", "cut"))
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())


def test_pairs_that_are_too_long_are_counted_and_if_all_are_refused(answering, run):
    words = [*TINY, f"data.path={answering[1]}", "out_dir=short"]
    result = run("train.py", *words, "model.block_size=10")
    assert result.code == 0 and "pairs of the train split are longer than 10 tokens" in result.err
    result = run("eval.py", "checkpoint=short/ckpt.pt", f"data.path={answering[1]}")
    long = 3 * sum(2 * len(word) + 2 > 10 for word in WORDS)
    assert f"\n{long} pairs are longer than the context, and are left out" in f"\n{result.err}"
    result = run("eval.py", f"checkpoint={answering[0]}/ckpt.pt", f"data.path={answering[1]}")
    assert result.code == 0 and "left out" not in result.err
    result = run("train.py", *words, "model.block_size=4")
    assert result.code == 2 and "and no other is there: set a larger model.block_size" in result.err


def test_a_checkpoint_and_a_text_of_other_kinds_are_refused(answering, run, trained, text_file):
    out, path = answering
    for folder, data_path, says in (
        (out, text_file, "holds stream, and the checkpoint was trained on pairs: take another"),
        (trained, path, "holds pairs, and the checkpoint was trained on stream"),
    ):
        result = run("eval.py", f"checkpoint={folder}/ckpt.pt", f"data.path={data_path}")
        assert result.code == 2 and says in result.err
    result = run("train.py", *TINY, f"data.path={path}", f"training.init_from={trained}/ckpt.pt")
    assert result.code == 2 and "tokenizer has no end token: start from one" in result.err


def test_weights_of_documents_can_learn_pairs(run, tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"text": word} for word in WORDS])
    assert run("train.py", *TINY, f"data.path={path}", "out_dir=docs").code == 0
    pairs = jsonl(tmp_path / "p.jsonl", [{"prompt": w, "response": w} for w in WORDS])
    words = [*TINY, f"data.path={pairs}", "training.init_from=docs/ckpt.pt", "out_dir=pairs"]
    result = run("train.py", *words)
    assert result.code == 0, result.err
    assert load_model("pairs/ckpt.pt").layout == "pairs"
    assert load_model("docs/ckpt.pt").layout == "documents"


@pytest.mark.parametrize("layout", ["stream", "pairs"])
def test_the_text_in_the_log_fills_a_context_or_answers_the_first_prompt_of_val(layout):
    """A pair is `prompt -> answer`, up to its first end token."""
    eos = TOKENIZER.eos
    pair = torch.tensor([*TOKENIZER.encode("ab"), eos, *TOKENIZER.encode("ba"), eos, eos])
    predict = torch.arange(7) > 2
    filled = pair if layout == "pairs" else torch.from_numpy(TOKENIZER.encode("abbabba"))

    def fill(model, ids, is_masked, generator):
        assert is_masked.tolist() == [predict.tolist() if layout == "pairs" else [True] * 7]
        return SimpleNamespace(ids=filled[None])

    run = SimpleNamespace(
        corpus=SimpleNamespace(tokenizer=TOKENIZER, layout=layout),
        model=SimpleNamespace(config=SimpleNamespace(block_size=7)),
        eval_rows={"val": [data.Row(pair, predict, 3), None]},
        sampler=SimpleNamespace(fill=fill),
        ema=None,
    )
    text = runs.sample_text(run, None)
    assert text == ("ab -> ba" if layout == "pairs" else "abbabba")


def test_samples_of_documents_begin_and_end_where_documents_do(run, tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"text": "abc"}, {"text": "cab"}] * 60)
    short = ("training.max_iters=200", "training.batch_size=8")
    train(tmp_path, f"data.path={path}", "model.block_size=16", *short)
    words = ("checkpoint=out/ckpt.pt", "num_samples=20", "output=o.jsonl", "system.device=cpu")
    assert run("sample.py", *words, "sampling.steps=16", "sampling.strategy=confidence").code == 0
    found = [json.loads(line)["text"] for line in Path("o.jsonl").read_text().splitlines()]
    assert sum(sample in ("abc", "cab") for sample in found) >= 14


def test_one_document_is_a_stream_and_so_are_documents_for_a_tokenizer_without_an_end(tmp_path):
    one = content("documents", ["ab" * 20])
    assert data.prepare(one.for_tokenizer(None), "char", 0, tmp_path).layout == "stream"
    two = content("documents", ["ab" * 20, "ba"])
    assert data.prepare(two, "char", 0, tmp_path).layout == "documents"
    old = CharTokenizer("ab\n")
    corpus = data.prepare(two.for_tokenizer(old), "char", 0, tmp_path, old)
    assert (corpus.layout, corpus.tokenizer.eos) == ("stream", None)
    assert old.decode([*corpus.train, *corpus.val]) == "ab" * 20 + "\nba"


def test_rows_set_the_context_and_another_one_is_refused(run, tmp_path):
    (tmp_path / "g.txt").write_text("abcd\ndcba\n" * 20)
    words = [w for w in TINY if "block_size" not in w] + ["data.path=g.txt", "data.rows=true"]
    assert run("train.py", *words).code == 0
    loaded = load_model("out/ckpt.pt")
    assert (loaded.model.config.block_size, loaded.layout) == (4, "rows")
    result = run("train.py", *words, "model.block_size=8", "out_dir=other")
    assert result.code == 2 and "model.block_size=8 is not what g.txt has (4)" in result.err
    result = run("sample.py", "checkpoint=out/ckpt.pt", "prompt=a..d", "blank=.")
    assert result.code == 0 and result.out[0] == "a" and result.out[3] == "d"


def test_bins_and_checkpoints_whose_layout_cannot_be_are_refused(trained, tmp_path):
    tokens = {split: np.zeros(9, dtype=np.uint16) for split in data.SPLITS}
    for number, (layout, says) in enumerate(
        [("pairs", "holds pairs; its tokenizer has no end"), ("heap", "is unknown")]
    ):
        folder = tmp_path / str(number)
        data.write_bins(folder, tokens, CharTokenizer("a"), {"layout": layout})
        with pytest.raises(UserError, match=says):
            open_bins(folder)
    state = checkpoint.load(trained / "ckpt.pt")
    state["corpus"]["layout"] = "documents"
    checkpoint.save(tmp_path / "c.pt", state)
    with pytest.raises(UserError, match="no end token, and it was trained on documents"):
        load_model(tmp_path / "c.pt")


def test_other_boundaries_are_another_text(tmp_path):
    """Also where the texts, put together, are the same."""
    one, two = (
        content("documents", ["ab\ncd", "ef"] * 9),
        content("documents", ["ab", "cd", "ef"] * 9),
    )
    assert one.text == two.text and one.sha256 != two.sha256
    counts = [
        data.prepare(each, "char", 0, tmp_path).train.tolist().count(7) for each in (one, two)
    ]
    assert counts[0] < counts[1]


@given(st.integers(1, 200))
def test_a_limit_is_about_a_number_of_tokens_also_of_pairs(limit):
    rows = rows_of([("ab", "ba")] * 100, 30)  # 6 tokens each, filled up to 30
    assert len(rows.evenly(limit)) == max(1, limit // 6)
    assert rows_of([("abcabc", "ab")] * 3, 4).evenly(limit) == []


@pytest.mark.parametrize("limit", range(60, 600, 30))
def test_a_limit_meets_both_kinds_of_lines_that_take_turns(limit):
    rows = rows_of([("ab", "a"), ("ab", "b")] * 300, 5)
    chosen = rows.evenly(limit)
    answers = [row.ids[3].item() for row in chosen]
    assert len(chosen) == limit // 5
    assert 0.3 < answers.count(answers[0]) / len(answers) < 0.7


def test_a_limit_is_shared_by_files():
    files = [("a", rows_of([("ab", "ba")] * 100, 30)), ("b", rows_of([("ab", "ba")] * 300, 30))]
    scored = texts.whole("both", files, TOKENIZER, limit=240)
    assert scored.document.tolist() == [0] * 10 + [1] * 30


def test_grids_of_another_size_and_bins_of_another_layout_are_not_scored(run, tmp_path):
    (tmp_path / "g.txt").write_text("abcd\ndcba\n" * 20)
    (tmp_path / "h.txt").write_text("abcdabcd\n" * 4)
    words = [w for w in TINY if "block_size" not in w] + ["data.path=g.txt", "data.rows=true"]
    assert run("train.py", *words).code == 0
    result = run("eval.py", "checkpoint=out/ckpt.pt", "data.path=h.txt")
    assert result.code == 2 and "row 1 has 8 tokens, not 4" in result.err
    assert run("eval.py", "checkpoint=out/ckpt.pt", "data.path=g.txt").code == 0
    tokenizer = load_model("out/ckpt.pt").tokenizer
    tokens = {split: tokenizer.encode("abcd" * 4) for split in data.SPLITS}
    data.write_bins(tmp_path / "bins", tokens, tokenizer, {"layout": "stream"})
    assert run("eval.py", "checkpoint=out/ckpt.pt", "data.dir=bins").code == 0
    tokenizer = CharTokenizer(tokenizer.characters, ends=True)
    data.write_bins(tmp_path / "more", tokens, tokenizer, {"layout": "documents"})
    result = run("eval.py", "checkpoint=out/ckpt.pt", "data.dir=more")
    assert result.code == 2 and "holds documents, not rows" in result.err


def test_the_curve_of_pairs_is_the_cost_of_a_masked_token(answering):
    """A network that pays 1 nat for each masked token, filling included."""
    rows = rows_of(PAIRS, 12).evenly()
    found = diffusion.estimate(
        diffusion.any_order, lambda xt, x0, where: where.float(), [row.ids for row in rows],
        mask_id=4, draws=8, predict=[row.predict for row in rows],
    )  # fmt: skip
    samples = bounds.NLLSamples(*found).counting([row.count for row in rows])
    costs = [cost for cost, _ in bounds.curve(samples, 4) if not math.isnan(cost)]
    assert costs == pytest.approx([1.0] * len(costs)) and len(costs) == 4
    assert samples.bound()[0] == pytest.approx(
        sum(int(row.predict.sum()) for row in rows) / sum(row.count for row in rows)
    )


def test_shards_without_a_whole_pair_are_refused(tmp_path, run):
    tokens = {split: TOKENIZER.encode("abc" * 20) for split in data.SPLITS}
    data.write_bins(tmp_path / "bins", tokens, TOKENIZER, {"layout": "pairs"})
    result = run("train.py", *TINY, "data.dir=bins")
    assert result.code == 2 and "no other is there" in result.err


def test_bins_of_other_programs_can_be_rows(tmp_path):
    for split in data.SPLITS:
        np.arange(12, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    corpus = open_bins(tmp_path, {"kind": "ids", "vocab_size": 12}, rows=True)
    rows = corpus.rows("train", 4, overlap=True)
    assert [row.ids.tolist() for row in rows.evenly()] == np.arange(12).reshape(3, 4).tolist()
    with pytest.raises(UserError, match=r"not made of rows of model\.block_size=5 tokens"):
        corpus.rows("train", 5)
