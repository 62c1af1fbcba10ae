"""The load test of the demo, for seconds; `python -m tests.stress.load` takes minutes."""

import json
import sys

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
if not sys.platform.startswith("linux"):
    pytest.skip("the load test reads memory from /proc", allow_module_level=True)

from tests.stress import load


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """The figures of a short load test; it raises for a breach."""
    path = tmp_path_factory.mktemp("load") / "load.json"
    names = ("seconds", "clients", "slow", "seed", "output")
    load.main(load.cli.section(dict(zip(names, (2.0, 4, 3, 1, str(path)), strict=True))))
    return json.loads(path.read_text())


def test_valid_requests_are_answered_during_attacks(figures):
    for name in ("page", "generate", "tokens"):
        assert figures["answers"][name]["200"] > 0
    assert figures["after"] == "200"


def test_every_fast_attack_was_tried(figures):
    fast = {name for name, attack in load.ATTACKS.items() if not attack.slow}
    assert fast <= set(figures["answers"])


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("traversal", "404"), ("another host", "421"), ("another origin", "403")),
        *(("no json type", "415"), ("large body", "413"), ("bad values", "400")),
    ],
)
def test_attacks_are_refused_by_their_status(figures, name, status):
    assert figures["answers"][name][status] > 0


def test_a_breach_ends_in_an_error():
    log = load.Log()
    log.add("traversal", load.Answer("200"), 0.1)
    config = load.cli.section({"seconds": 1.0, "output": ""})
    with pytest.raises(RuntimeError, match=r"breaches: .*traversal.*200"):
        load.print_figures(log, [1.0, 1.0, 1.0], "200", config)


def test_a_demo_that_grows_ends_in_an_error():
    config = load.cli.section({"seconds": 60.0, "output": ""})
    with pytest.raises(RuntimeError, match="the demo failed"):
        load.print_figures(load.Log(), [100.0, 100.0, 120.0], "200", config)
