"""The viewer and the picture show what happened, and no text in them does anything."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import load_model

from diffusion import sample
from nanomdm.checkpoint import Loaded
from nanomdm.prompts import Canvas, make_canvas
from nanomdm.random import generator
from nanomdm.strategies import Sampler, from_config
from tools import page, picture, trace
from tools.trace import unpack

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)><!--&\"'"
BLANK = 65535
CASES = {
    "spread": {"steps": 8},
    "remask": {"steps": 24, "remask_rate": 0.3},
    "stochastic": {"steps": 60},  # some steps reveal nothing
    "confidence": {"steps": 4, "block_length": 10},
    "eb": {"gamma": 3.0},
}


@pytest.fixture(scope="module")
def loaded(trained) -> Loaded:
    return load_model(trained / "ckpt.pt")


def sampler(strategy: str, steps: int = 32, temperature: float = 1.0, **options) -> Sampler:
    section = {"strategy": strategy, "steps": steps, "temperature": temperature}
    return from_config(SimpleNamespace(**section, options=options), sample)


def canvas_of(loaded: Loaded, prompt: str, length: int) -> Canvas:
    return make_canvas(prompt, length, loaded.tokenizer, loaded.model.config.block_size)


def recorded(loaded, canvases: list[Canvas], settings: Sampler, **options) -> list[list[dict]]:
    """The messages of each row."""
    rows = [[] for _ in canvases]
    options = {"send": lambda row, message: rows[row].append(message)} | options
    trace.record(loaded, canvases, settings, 1337, **options)
    return rows


def filled(loaded, canvases: list[Canvas], settings: Sampler, **options):
    """What the sampler does without a recorder."""
    ids, is_masked, _ = (torch.stack(tensors) for tensors in zip(*canvases, strict=True))
    return settings.fill(
        loaded.model, ids, is_masked, generator=generator(1337, "sample"), **options
    )


def replay(messages: list[dict], names: str = "ids") -> list[list[int | None]]:
    """The states that messages describe, as ids (or texts) and None, by what trace.py says."""
    ids, states = [], []
    for message in messages:
        ids += message.get(names, [])
        if "given" in message:
            state = [None if n == BLANK else ids[n] for n in unpack(message["given"])]
        for position, number, _ in zip(*[iter(unpack(message.get("set", "")))] * 3, strict=True):
            state[position] = ids[number]
        for position in unpack(message.get("mask", "")):
            state[position] = None
        states.append(list(state))
    return states


@pytest.mark.parametrize("strategy", CASES)
def test_a_trace_replays_every_state_of_the_sampler(loaded, strategy):
    settings, canvases = sampler(strategy, **CASES[strategy]), [canvas_of(loaded, "KING", 30)] * 2
    rows, mask_id = recorded(loaded, canvases, settings), loaded.model.config.mask_id
    ids, is_masked, _ = (torch.stack(tensors) for tensors in zip(*canvases, strict=True))
    states = [ids.masked_fill(is_masked, mask_id)]
    filled(loaded, canvases, settings, callback=lambda step, s, xt: states.append(xt.clone()))
    for row, messages in enumerate(rows):
        expected = [[None if i == mask_id else i for i in xt[row].tolist()] for xt in states]
        assert replay(messages) == expected


def test_the_alternatives_are_the_networks_answer_to_the_state_before(loaded):
    settings = sampler("remask", steps=12, remask_rate=0.3, temperature=0.5)
    (messages,) = recorded(loaded, [canvas_of(loaded, "The ", 24)], settings)
    states, looked = replay(messages), 0
    ids = [i for message in messages for i in message.get("ids", [])]
    for before, message in zip(states, messages[1:], strict=False):
        if "best" not in message:
            continue
        xt = torch.tensor([[loaded.model.config.mask_id if i is None else i for i in before]])
        with torch.no_grad():
            p = loaded.model(xt)[0, [i is None for i in before]].softmax(dim=-1)
        best = p.topk(5)
        assert [ids[n] for n in unpack(message["best"])] == best.indices.flatten().tolist()
        found = torch.tensor(unpack(message["p"])) / BLANK
        assert torch.allclose(found, best.values.flatten(), atol=1e-5)
        entropy = -(p * p.log()).sum(dim=-1).mean()
        assert message["entropy"] == pytest.approx(entropy.item(), abs=6e-4)
        looked += 1
    assert looked > 8


def test_under_guidance_the_alternatives_are_those_that_the_sampler_draws_from(loaded):
    settings = sampler("spread", steps=6, guidance=1.5)
    canvases, events = [canvas_of(loaded, "KING 3", 24)], []
    (messages,) = recorded(loaded, canvases, settings)
    filled(loaded, canvases, settings, history=events)
    ids = [i for message in messages for i in message.get("ids", [])]
    for event, before, message in zip(events, replay(messages)[:-1], messages[1:], strict=True):
        masked = [i for i, token in enumerate(before) if token is None]
        rows = [masked.index(i) for i in event.revealed[0].nonzero().flatten().tolist()]
        best = torch.tensor([ids[n] for n in unpack(message["best"])]).view(-1, 5)[rows]
        p = torch.tensor(unpack(message["p"])).view(-1, 5)[rows] / BLANK
        expected = event.logits.softmax(dim=-1).topk(5)
        assert torch.equal(best, expected.indices)
        assert torch.allclose(p, expected.values, atol=2e-5)


def test_a_revealed_token_comes_with_the_probability_that_it_had(loaded):
    settings, events = sampler("spread", steps=6, temperature=0.5, top_p=0.9), []
    canvases = [canvas_of(loaded, "KING 3", 24)] * 2
    rows = recorded(loaded, canvases, settings)
    filled(loaded, canvases, settings, history=events)
    for step, event in enumerate(events, start=1):
        p = event.logits.softmax(dim=-1).gather(1, event.tokens[:, None]).squeeze(1)
        packed = [unpack(messages[step].get("set", "")) for messages in rows]
        found = torch.tensor(packed[0][2::3] + packed[1][2::3]) / BLANK
        assert torch.allclose(found, p, atol=2e-5)


def test_the_page_holds_the_text_that_sample_py_writes(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "prompt=The [MASK*20] night", "sampling.steps=5")
    assert run("tools.view", *words, "num_samples=2", "out=page.html").code == 0
    with open("page.html") as file:
        data = json.loads(re.search(r'id="data">(.*?)</script>', file.read())[1])
    texts = ["".join(replay(messages, "texts")[-1]) for messages in data["traces"]]
    expected = run("sample.py", *words, "num_samples=2", "output=samples.jsonl")
    assert expected.code == 0
    with open("samples.jsonl") as file:
        assert texts == [json.loads(line)["text"] for line in file]


# --- Hostile and large ---------------------------------------------------------------------------


class Words:
    """A vocabulary of texts, for a network whose answers are noise."""

    eos = None

    def __init__(self, texts: list[str]):
        self.texts, self.vocab_size = texts, len(texts)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(self.texts[i].encode() for i in ids)


class Noise:
    device = torch.device("cpu")

    def __init__(self, V: int, L: int):
        self.config = SimpleNamespace(vocab_size=V, mask_id=V, block_size=L)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, xt):
        return torch.rand(*xt.shape, self.config.vocab_size, generator=self.generator)


def noisy(texts: list[str], L: int) -> SimpleNamespace:
    return SimpleNamespace(model=Noise(len(texts), L), tokenizer=Words(texts), layout="stream")


def blank(L: int) -> Canvas:
    return Canvas(torch.zeros(L, dtype=torch.long), torch.ones(L, dtype=torch.bool))


def test_256_tokens_in_128_steps_with_alternatives_stay_below_a_megabyte():
    texts = [f"word {n} " for n in range(1000)]
    settings = sampler("remask", steps=128)
    rows = recorded(noisy(texts, 256), [blank(256)], settings)
    content = page.assemble("view", "nanoMDM", {"subtitle": "", "traces": rows})
    best = [len(unpack(message.get("best", ""))) for message in rows[0]]
    assert len(best) == 129 and sum(best) > 5 * 256 * 128 * 0.48
    assert 300_000 < len(content.encode()) < 1_000_000


class Elements(HTMLParser):
    """The elements of a page in order, and what scripts and styles hold."""

    def __init__(self, content: str):
        super().__init__()
        self.found, self.inside = [("", {})], {}
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.found.append(("", {}))

    def handle_data(self, data):
        tag, attributes = self.found[-1]
        if tag in ("script", "style"):
            key = (tag, attributes.get("type", ""))
            self.inside[key] = self.inside.get(key, "") + data


@pytest.fixture(scope="module")
def hostile() -> tuple[str, str]:
    """A page and a picture in which every text is hostile."""
    loaded = noisy([HOSTILE + str(n) for n in range(6)], 8)
    rows = recorded(loaded, [blank(8)], sampler("spread", steps=3))
    content = page.assemble("view", HOSTILE, {"subtitle": HOSTILE, "traces": rows})
    return content, picture.draw(rows[0], 8.0)


def test_no_text_adds_an_element_to_the_page(hostile):
    harmless = page.assemble("view", "title", {"subtitle": "", "traces": []})
    tags = [tag for tag, _ in Elements(hostile[0]).found]
    assert tags == [tag for tag, _ in Elements(harmless).found]
    assert not any(name.startswith("on") for _, a in Elements(hostile[0]).found for name in a)
    data = json.loads(Elements(hostile[0]).inside["script", "application/json"])
    assert data["subtitle"] == HOSTILE


def test_the_policy_of_the_page_lets_in_its_own_script_and_style_alone(hostile):
    elements = Elements(hostile[0])
    (policy,) = [a["content"] for _, a in elements.found if "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == "'none'"
    for tag in ("script", "style"):
        digest = hashlib.sha256(elements.inside[tag, ""].encode()).digest()
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_the_page_names_no_address(hostile):
    addresses = re.findall(r"//([\w.]+\.\w+)", hostile[0])
    assert set(addresses) == {"www.w3.org"}  # in the name of SVG, which is not fetched
    attributes = [attributes for _, attributes in Elements(hostile[0]).found]
    assert not any("src" in each for each in attributes)
    assert all(each.get("href", "data:").startswith("data:") for each in attributes)


# --- The picture ---------------------------------------------------------------------------------


def test_a_hostile_text_is_text_in_the_picture(hostile):
    root = ElementTree.fromstring(hostile[1])
    assert {element.tag.split("}")[1] for element in root.iter()} <= {
        *("svg", "title", "desc", "style", "defs", "linearGradient", "stop", "rect", "g", "text")
    }
    assert HOSTILE in next(element.text for element in root if element.tag.endswith("desc"))


def test_the_picture_shows_each_token_from_its_step_on(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "prompt=KING", "sampling.steps=5", "format=svg")
    assert "num_samples has no effect" in run("tools.view", *words, "num_samples=2").err
    drawn = run("tools.view", *words)
    assert drawn.code == 0 and not drawn.err
    text = run("sample.py", *words[:3]).out.rstrip("\n")
    root = ElementTree.parse("sample.svg").getroot()
    letters = [
        (float(x), float(element.get("y")), c)
        for element in root.iter()
        if element.tag.endswith("text") and " n " not in f" {element.get('class')} "
        for x, c in zip(element.get("x").split(), element.text, strict=True)
    ]
    assert [c for *_, c in sorted(letters, key=lambda cell: (cell[1], cell[0]))] == list(
        "".join(text.split())
    )
    notes = [e.text for e in root.iter() if e.get("class", "").startswith("n n")]
    assert notes[0] == "step 0 of 5 · 28 masks left" and notes[-1] == "step 5 of 5 · 0 masks left"


def test_a_position_is_something_at_every_step_of_the_picture(loaded):
    settings = sampler("remask", steps=30, remask_rate=0.4)
    (messages,) = recorded(loaded, [blank(32)], settings)
    stays = picture.stays_of(messages)
    assert any(len(position) > 2 for position in stays)
    for position, found in enumerate(stays):
        starts, ends = [start for start, *_ in found], [end for _, end, _ in found]
        assert starts[1:] == ends[:-1] and starts[0] == 0 and ends[-1] is None
        for step, state in enumerate(replay(messages)):
            (text,) = [t for a, b, t in found if a <= step and (b is None or step < b)]
            token = state[position]
            assert text == ("" if token is None else loaded.tokenizer.decode([token]))


def test_lines_of_the_picture_break_at_blanks():
    texts = list("aa " * 30 + "\n" + "b" * 70)
    places, _ = picture.lay_out(texts)
    assert max(column for column, _ in places) < picture.WIDE + 1
    lines = {}
    for text, (_, line) in zip(texts, places, strict=True):
        lines[line] = lines.get(line, "") + text
    assert list(lines.values()) == ["aa " * 21, "aa " * 9 + "\n", "b" * 64, "b" * 6]
    places, _ = picture.lay_out([" to", "ken"] * 11)
    assert [line for _, line in places] == [0] * 20 + [1] * 2


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("format=pdf", "format=pdf is unknown: choose one of html, svg"),
        ("num_samples=0", "num_samples=0 must be positive"),
        ("alternatives=0", "alternatives=0 must be at least 1"),
        ("seconds=0", "seconds=0 must be at least 1"),
        ("sampling.length=-1", "sampling.length=-1 must be 0 or more"),
        ("sampling.length=33", "the text has 33 tokens, and at most 32 can be shown"),
        ("sampling.steps=0", "sampling.steps=0 must be positive"),
        (f"prompt={'n' * 40}", "prompt has 40 tokens but sampling.length is 32"),
        ("prompt=[MASK*99999999999999]", "has 99999999999999 tokens, and at most 32 can be"),
        (f"prompt={'n' * 32}", "nothing is masked"),
        ("sampling.strategy=best", "sampling.strategy=best is unknown: choose stochastic"),
        ("sampling.options={gamma: 1}", "sampling.options.gamma is no option of spread"),
        ("out=x.svg", "out=x.svg is not format=html: set format=svg"),
        ("out=/dev/null/x.html", "cannot write out=/dev/null/x.html"),
    ],
)
def test_a_mistake_is_one_line(run, trained, word, message):
    result = run("tools.view", f"checkpoint={trained}/ckpt.pt", word)
    assert result.code == 2 and result.err.startswith("error: ") and message in result.err
    assert result.err.count("\n") == 1


def test_a_blank_that_no_prompt_has_is_said(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "prompt=KING", "blank=_", "sampling.steps=2")
    result = run("tools.view", *words)
    assert result.code == 0 and result.err == "blank has no effect: no prompt has _\n"


def test_what_send_raises_ends_the_sampling(loaded):
    class Left(Exception):
        pass

    sent = []

    def send(row, message):
        sent.append(message)
        if len(sent) == 4:
            raise Left

    with pytest.raises(Left):
        recorded(loaded, [blank(32)], sampler("first_hitting"), send=send)
    assert len(sent) == 4
