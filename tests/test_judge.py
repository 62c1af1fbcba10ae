"""bench/judge.py: what a judge says of texts, and when it may not say anything."""

import json
import math
import sys

import pytest
import torch
from conftest import QUIET, TEXT, TINY, load_model

import train
from bench import judge as judging
from bench.score import nll_samples
from nanomdm import cli

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words() -> list[str]:
    return judging.cut(TEXT, 64, 30, seed=0)


class Unigram(judging.Judge):
    """A judge over bytes; `cost` says what each byte costs, in nats."""

    name, context, device = "unigram", 10**6, CPU

    def __init__(self, cost):
        self.cost = cost

    def encode(self, text):
        return list(text.encode())

    def nll(self, x0):
        return torch.stack([self.cost(row) for row in x0])


def flat(row: torch.Tensor) -> torch.Tensor:
    return torch.full(row.shape, 8 * math.log(2), dtype=torch.float64)


def order_loving(row: torch.Tensor) -> torch.Tensor:
    """Cheap is a byte that followed the one before it somewhere in TEXT."""
    pairs = set(zip(TEXT.encode(), TEXT.encode()[1:], strict=False))
    known = [True, *((a, b) in pairs for a, b in zip(row.tolist(), row.tolist()[1:], strict=False))]
    return torch.where(torch.tensor(known), 1.0, 30.0).double()


def test_a_judge_that_finds_all_bytes_equal_gives_eight_bits_a_byte():
    verdict = judging.judge_texts(Unigram(flat), ["abc", "déjà vu"])
    assert verdict.bits_per_byte == pytest.approx(8) and verdict.error == pytest.approx(0)


def test_bits_are_divided_by_the_bytes_of_all_texts_together():
    costs = Unigram(lambda row: torch.full(row.shape, float(len(row))).double())
    verdict = judging.judge_texts(costs, ["ab", "cdef"])
    assert verdict.bits_per_byte == pytest.approx((2 * 2 + 4 * 4) / 6 / math.log(2))


def test_a_long_text_costs_the_sum_of_its_tokens_whatever_the_context():
    ids_cost = Unigram(lambda row: row.double())
    whole = ids_cost.nats(["hello, world"])
    ids_cost.context = 5
    assert ids_cost.nats(["hello, world"]) == whole == [sum(b"hello, world")]


def test_the_batch_size_does_not_change_the_cost():
    one, many = (Unigram(order_loving).nats([TEXT[:50], TEXT[:20], "x"], b) for b in (1, 8))
    assert one == many


@pytest.mark.parametrize(
    "ids, expected", [([1, 1, 1, 1], 0.0), ([1, 2, 3, 4], math.log(4)), ([1, 1, 2, 2], math.log(2))]
)
def test_entropy_is_that_of_how_often_each_token_occurs(ids, expected):
    assert judging.entropy(ids) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text, n, expected", [("abab", 2, 2 / 3), ("aaaa", 2, 1 / 3), ("ab", 4, 1)]
)
def test_distinct_is_the_share_of_different_ngrams(text, n, expected):
    assert judging.distinct_ngrams(text, n) == pytest.approx(expected)


def test_the_controls_have_the_words_and_the_length_of_the_text(words):
    real, shuffled, repeated = judging.control_texts(words, seed=0).values()
    assert real == words
    for a, b, c in zip(real, shuffled, repeated, strict=True):
        assert sorted(a) == sorted(b) and len(a) == len(c)
        assert judging.entropy(c) < judging.entropy(a)


def test_a_judge_that_sees_no_order_is_refused(words):
    with pytest.raises(ValueError, match="cannot judge"):
        judging.controls(Unigram(flat), words)


def test_a_judge_that_prefers_text_to_its_shuffled_words_is_taken(words):
    rows = judging.controls(Unigram(order_loving), words)
    assert list(rows) == ["held-out text", "its words shuffled", "one line repeated"]


def test_texts_whose_repetition_does_not_lower_the_entropy_are_refused():
    texts = ["aa ab ba bb " * 3, "ab ba aa bb " * 3]
    judge = Unigram(lambda row: torch.arange(len(row)).double() * (row[0] == 97))
    with pytest.raises(ValueError, match=r"longer texts|cannot judge"):
        judging.controls(judge, texts)


@pytest.fixture(scope="module")
def control(tmp_path_factory, text_file):
    """The folder of a tiny autoregressive run, whose out_dir is out-ar."""
    folder = tmp_path_factory.mktemp("control")
    words = (*TINY, *QUIET, "training.max_iters=60", f"data.path={text_file}")
    words += ("training.objective=ar", "training.eval_interval=60")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words, f"out_dir={folder}/out-ar"])
        patch.chdir(folder)
        cli.main(train.main)
    return folder


def test_our_own_control_costs_what_eval_says(control):
    """Each block of the context by itself, so that both see the same."""
    loaded = load_model(control / "out-ar" / "best.pt")
    text = TEXT[:32]
    judge = judging.load_judge(str(control / "out-ar" / "best.pt"), CPU)
    ids = torch.from_numpy(loaded.tokenizer.encode(text))
    expected = nll_samples(loaded.model, [ids], seed=0, draws=1).nats.sum().item()
    assert judge.nats([text])[0] == pytest.approx(expected, rel=1e-5)


def test_a_text_beyond_the_context_is_read_in_windows(control):
    judge = judging.load_judge(str(control / "out-ar" / "best.pt"), CPU)
    model, text = judge.loaded.model, TEXT[:48]
    ids = torch.tensor(judge.encode(text))[None]

    def cost(part):
        log_probs = model(part).log_softmax(dim=-1)
        return -log_probs.gather(-1, part[..., None]).squeeze()

    with torch.no_grad():
        expected = cost(ids[:, :32]).sum() + cost(ids[:, 16:])[16:].sum()
    assert judge.nats([text])[0] == pytest.approx(expected.item(), rel=1e-5)


def test_the_bench_prints_and_writes_the_controls_and_the_samples(control, run, tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "KING 3:\\nThe crown"}\n{"text": "of swords"}\n')
    judge = f"judge={control}/out-ar/best.pt"
    words = ("samples=s.jsonl", "length=64", "texts=40", "output=o.json", "device=cpu")
    result = run("bench.judge", judge, *words)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert len(rows) == 4 and len(result.out.splitlines()) == 5
    for name, row in rows.items():
        assert f"{row['bits_per_byte']:.4f} ±" in result.out and name in result.out


def test_a_diffusion_checkpoint_is_no_judge(trained):
    with pytest.raises(ValueError, match="training.objective=ar"):
        judging.load_judge(str(trained / "ckpt.pt"), CPU)


def test_a_setting_that_the_bench_lacks_is_one_line(run):
    result = run("bench.judge", "jugde=x")
    assert result.code == 2 and result.err == "error: no setting jugde: did you mean judge?\n"


def test_a_text_with_what_is_special_to_hydra_arrives_as_it_is(run):
    result = run("bench.judge", "judge=${a}, it's {b}=c.pt", "device=cpu")
    assert result.code == 2 and "no checkpoint at ${a}, it's {b}=c.pt" in result.err


def test_a_bench_is_not_swept(run):
    result = run("bench.judge", "-m", "texts=1,2")
    assert result.code == 2 and "no option -m here" in result.err


# --- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of_a_tiny_gpt2(tmp_path_factory):
    """A GPT-2 of two layers over words, as transformers saves one."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gpt2")
    words = sorted(set(TEXT)) + ["<|endoftext|>"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<|endoftext|>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=33, n_embd=16, n_layer=2, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_is_a_judge_that_scores_every_token(folder_of_a_tiny_gpt2):
    import transformers

    judge = judging.load_judge(str(folder_of_a_tiny_gpt2), CPU)
    text = TEXT[:30]
    ids = judge.encode(text)
    assert len(ids) == 30 and judge.context == 32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of_a_tiny_gpt2).eval()
    inputs = torch.tensor([[judge.tokenizer.eos_token_id, *ids]])
    with torch.no_grad():  # the library's own loss: a mean over the tokens after the first
        loss = model(inputs, labels=inputs).loss.item()
    assert judge.nats([text])[0] == pytest.approx(30 * loss, rel=1e-4)


def test_a_name_that_is_neither_a_checkpoint_nor_a_model_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"cannot load judge {tmp_path}"):
        judging.load_judge(str(tmp_path), CPU)


def test_without_transformers_the_message_is_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        judging.load_judge("gpt2", CPU)
