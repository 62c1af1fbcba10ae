"""bench/cloze.py and tools/lm_eval.py: what is missing in a text, and tasks that go by it."""

import json
import math
import types

import pytest
import torch
from conftest import TEXT, load_model
from problems import LOOP, arbitrary_network

from bench import cloze
from bench.cloze import Fill, Item
from nanomdm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def texts_of(fill: Fill, context: int = 100):
    texts = cloze.as_texts([fill], TOKENIZER, context)
    shown = [bytes(row.tolist()).decode() for row in texts.rows]
    asked = [
        bytes(row[where].tolist()).decode()
        for row, where in zip(texts.rows, texts.predict, strict=True)
    ]
    return shown, asked, texts


def test_the_target_alone_is_predicted_between_what_surrounds_it():
    shown, asked, texts = texts_of(Fill("to be ", "or", " not"))
    assert (shown, asked, texts.sizes.tolist()) == (["to be or not"], ["or"], [2])


def test_a_long_context_keeps_what_is_nearest_to_the_target():
    shown, asked, _ = texts_of(Fill("0123456789", "XY", "abcdefghij"), context=8)
    assert (shown, asked) == (["789XYabc"], ["XY"])
    assert texts_of(Fill("0123456789", "XY", "a"), context=8)[0] == ["56789XYa"]


def test_a_target_beyond_the_context_is_predicted_piece_by_piece_given_what_is_before():
    shown, asked, texts = texts_of(Fill("ab", "0123456789"), context=8)
    assert "".join(asked) == "0123456789" and shown == ["ab0123", "01234567", "23456789"]
    assert texts.document.tolist() == [0, 0, 0]


def test_an_empty_target_is_refused():
    with pytest.raises(ValueError, match="nothing to predict"):
        texts_of(Fill("a", ""))


def test_the_last_word_goes_with_the_space_before_it():
    assert cloze.last_word({"text": "I don't care about signs\n"}) == Item(
        [Fill("I don't care about", " signs")]
    )


def test_accuracy_is_the_share_of_items_whose_right_choice_is_cheapest():
    items = [Item([Fill("", "a"), Fill("", "bcd")], answer) for answer in (0, 1, 1)]
    nats = torch.tensor([[1.0, 2.0, 1.0, 2.0, 5.0, 1.0], [1.1, 2.0, 3.0, 2.1, 5.0, 1.0]]).double()
    sizes = torch.tensor([1, 3] * 3)
    figures = cloze.score_choices(nats, items, sizes)
    assert figures["accuracy"]["value"] == pytest.approx(2 / 3)
    assert figures["accuracy_per_byte"]["value"] == pytest.approx(2 / 3)
    assert figures["undecided"]["value"] == pytest.approx(1 / 3)


def test_the_perplexity_of_words_is_that_of_their_mean_cost():
    figures = cloze.score_last_words(
        torch.tensor([[1.0, 3.0]]), [True, False], torch.tensor([2, 4])
    )
    assert figures["perplexity"] == pytest.approx(math.exp(2))
    assert figures["bits_per_byte"]["value"] == pytest.approx(4 / 6 / math.log(2))
    assert figures["accuracy"] == {"value": 0.5, "standard_error": pytest.approx(0.5 / 2**0.5)}


def test_greedy_filling_takes_the_surest_token_first():
    """Against a loop of its own: the most probable token of the surest position, one at a time."""
    network = arbitrary_network(LOOP)
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(causal=False, mask_id=LOOP.V), device=torch.device("cpu")
    )
    loaded = types.SimpleNamespace(model=Callable(network, model))
    rows = list(LOOP.data)
    predict = [torch.tensor([False, True, True, False])] * len(rows)
    texts = types.SimpleNamespace(rows=rows, predict=predict)
    expected = []
    for row in rows:
        xt = row.masked_fill(predict[0], LOOP.V)[None]
        while (xt == LOOP.V).any():
            probabilities = (
                network(xt)[0].softmax(dim=-1).masked_fill((xt[0] != LOOP.V)[:, None], -1)
            )
            place, token = divmod(int(probabilities.argmax()), LOOP.V)
            xt[0, place] = token
        expected.append(torch.equal(xt[0], row))
    assert cloze.greedy(loaded, texts) == expected and any(expected)


class Callable:
    def __init__(self, network, attributes):
        self.network, self.config, self.device = network, attributes.config, attributes.device

    def __call__(self, xt):
        return self.network(xt)


@pytest.fixture
def items(tmp_path):
    def items(*values: dict) -> str:
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
        return "path=items.jsonl"

    return items


def test_last_words_are_scored_from_a_file(run, trained, items, tmp_path):
    path = items({"text": TEXT[:60].strip()}, {"text": "The crown"}, {"text": "日本 語"})
    words = (f"checkpoint={trained}/best.pt", path, "draws=4", "output=o.json", "device=cpu")
    result = run("bench.cloze", *words)
    assert result.code == 0, result.err
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["items"] == 2 and "2 of 3 items (1 have" in result.out
    assert f"{figures['perplexity']:.2f}" in result.out
    assert sum(figures["nats"]) / 2 == pytest.approx(math.log(figures["perplexity"]))


def test_the_choice_that_is_text_beats_the_one_that_is_not(run, trained, items, tmp_path):
    item = {"context": "KING 1:\nThe", "choices": ["KKKKKK", " crown"], "answer": -1}
    words = (f"checkpoint={trained}/best.pt", "task=choices", "draws=4", "device=cpu")
    result = run("bench.cloze", items(item | {"answer": 1, "after": " of"}), *words)
    assert result.code == 0 and "accuracy " in result.out


@pytest.mark.parametrize(
    "word, said",
    [
        ("task=poem", "choose one of last_word"),
        ("path=none", "no file"),
        ("task=choices", "line 1"),
    ],
)
def test_a_mistake_is_one_line(run, items, word, said):
    result = run("bench.cloze", items({"text": "a b"}), word)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1


# --- lm-evaluation-harness -----------------------------------------------------------------------

TASKS = {
    "pick": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]""",
    "roll": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]""",
    "write": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{context}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]""",
}


@pytest.fixture
def local_tasks(tmp_path, monkeypatch):
    """Task files of our own over a local file, and a harness that cannot go online."""
    pytest.importorskip("lm_eval", reason="not installed here: pip install lm_eval")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    rows = [
        {"context": f"KING {n}:\nThe", "choices": [" crown", "KK:"], "answer": 0} for n in (1, 2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(head + files + body)
    return "include_path=tasks"


def test_the_harness_scores_rolls_and_generates_on_a_local_task(
    run, trained, local_tasks, tmp_path
):
    words = (f"checkpoint={trained}/best.pt", local_tasks, "draws=2", "output=o.json", "device=cpu")
    result = run("tools.lm_eval", "tasks=[pick,roll,write]", *words)
    assert result.code == 0, result.err
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert set(results) == set(TASKS)
    assert 0 < results["roll"]["bits_per_byte,none"] < 20


def test_what_the_harness_gets_is_the_conditional_bound(trained, local_tasks):
    from bench.score import nll_samples
    from nanomdm.cli import section
    from tools import lm_eval as adapter

    loaded = load_model(trained / "best.pt")
    config = section({"seed": 0, "draws": 3, "batch_size": 8, "steps": 4, "strategy": "confidence"})
    fills = [Fill("The ", "crown"), Fill("", "of"), Fill("The sw", "ord")]
    texts, nats = adapter.score(loaded, fills, config)
    expected = nll_samples(loaded.model, texts.rows, seed=0, draws=3, predict=texts.predict)
    assert nats == pytest.approx((-expected.nats.mean(dim=0)).tolist(), rel=1e-5)
    request = [types.SimpleNamespace(args=(fill.before, fill.target)) for fill in fills]
    answers = adapter.make_adapter(loaded, config).loglikelihood(request)
    assert [value for value, _ in answers] == pytest.approx(nats)


def test_a_generated_text_stops_before_the_first_stop(trained):
    from nanomdm.cli import section
    from tools import lm_eval as adapter

    loaded = load_model(trained / "best.pt")
    config = section({"seed": 0, "steps": 8, "strategy": "stochastic"})
    wanted = {"max_gen_toks": 16, "temperature": 1.0}
    whole = adapter.generate(loaded, "KING", wanted, config)
    assert len(whole) == 16
    stop = whole[5]
    stopped = adapter.generate(loaded, "KING", wanted | {"until": [stop]}, config)
    assert stopped == whole.split(stop)[0]


def test_no_task_is_one_line(run, trained):
    pytest.importorskip("lm_eval", reason="not installed here: pip install lm_eval")
    result = run("tools.lm_eval", f"checkpoint={trained}/best.pt")
    assert result.code == 2 and "tasks=[lambada_openai]" in result.err
