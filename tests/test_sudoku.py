"""Sudoku: the generator, the rules, the benchmark, and a grid in the viewer."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import QUIET, TINY, load_model
from hypothesis import given
from hypothesis import strategies as st

from bench import sudoku as bench
from nanomdm import strategies, sudoku, text, texts
from tools import picture, trace

SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SMALL = "1234341221434321"  # 4 x 4


def digits(grid: str) -> np.ndarray:
    return np.array([[int(digit) - 1 for digit in grid]])


# --- The rules ----------------------------------------------------------------------------------


def test_a_published_solution_keeps_the_rules():
    assert bench.is_solved(digits(SOLVED), 9).tolist() == [True]


@given(st.integers(0, 80), st.integers(0, 80))
def test_no_exchange_of_two_cells_with_other_digits_keeps_the_rules(i, j):
    grid = digits(SOLVED)
    different = grid[0, i] != grid[0, j]
    grid[0, [i, j]] = grid[0, [j, i]]
    assert bool(bench.is_solved(grid, 9)[0]) is not bool(different)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_a_grid_whose_rows_and_columns_are_right_and_whose_boxes_are_not_is_no_solution(size):
    row = np.arange(size)
    grid = ((row[:, None] + row) % size).reshape(1, -1)  # a Latin square
    assert not bench.is_solved(grid, size)[0]
    assert sudoku.units(size).shape == (3 * size, size)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_every_grid_of_the_generator_and_every_variant_of_it_is_solved(size):
    for seed in range(10):
        grid = np.array(sudoku.solve(size, seed))
        variants = sudoku.shuffled(grid, size, 200, np.random.default_rng(seed))
        assert bench.is_solved(grid[None], size)[0] and bench.is_solved(variants, size).all()
        assert len(np.unique(variants, axis=0)) > 50


def test_the_variants_of_a_grid_have_every_digit_in_every_cell():
    variants = sudoku.shuffled(digits(SOLVED)[0], 9, 3000, np.random.default_rng(0))
    counts = np.stack([(variants == digit).sum(axis=0) for digit in range(9)])
    assert counts.min() > 3000 / 9 * 0.7 and counts.max() < 3000 / 9 * 1.3


def test_the_4_x_4_grids_are_those_that_there_are():
    variants = [
        sudoku.shuffled(np.array(sudoku.solve(4, seed)), 4, 500, np.random.default_rng(seed))
        for seed in range(20)
    ]
    assert len(np.unique(np.concatenate(variants), axis=0)) == 288


# --- The data set -------------------------------------------------------------------------------


def test_no_grid_for_validation_is_among_those_to_train_on(tmp_path):
    content = text.find("sudoku4", "", tmp_path, rows=True)
    train, val = texts.split_texts(content)
    assert val and not set(val) & set(train) and len({*train, *val}) == len(train + val)
    assert bench.is_solved(np.concatenate([digits(grid) for grid in train + val]), 4).all()


def test_the_9_x_9_grids_for_validation_are_no_variants_of_those_to_train_on(monkeypatch):
    monkeypatch.setattr(sudoku, "VARIANTS", 2)
    grids = sudoku.lines(9, 20).split()
    assert len(grids) == 20  # none twice: the split lies between two grids of the generator
    seeds = [np.array(sudoku.solve(9, seed)) for seed in range(10)]
    same = np.bincount(seeds[9], minlength=9)
    assert same.tolist() == [9] * 9 and not any((seed == seeds[9]).all() for seed in seeds[:9])


def test_a_data_set_is_generated_once_and_is_the_same_everywhere(tmp_path):
    first = text.find("sudoku4", "", tmp_path / "a", rows=True).texts
    path = tmp_path / "a" / "sudoku4.txt"
    path.write_text(SMALL)
    assert text.find("sudoku4", "", tmp_path / "a", rows=True).texts == [SMALL]
    assert text.find("sudoku4", "", tmp_path / "b", rows=True).texts == first


# --- The benchmark ------------------------------------------------------------------------------


def test_a_solution_keeps_rules_and_clues():
    assert bench.is_solution(SMALL, "1..4............", 4)
    assert not bench.is_solution(SMALL, "2..4............", 4)  # a clue was changed
    assert not bench.is_solution("1234" * 4, "................", 4)
    assert not bench.is_solution(SMALL[:-1], "................", 4)
    assert not bench.is_solution(SMALL[:-1] + ".", "................", 4)


@given(st.floats(0.01, 1), st.integers(0, 99))
def test_a_puzzle_has_its_share_of_blanks_and_the_grids_other_digits(share, seed):
    puzzle = bench.blanked(SOLVED, share, np.random.default_rng(seed))
    assert puzzle.count(".") == round(share * 81)
    assert all(clue in (".", digit) for clue, digit in zip(puzzle, SOLVED, strict=True))


FOUR = (
    *(*TINY, *QUIET, "data.dataset=sudoku4", "data.rows=true", "model.block_size=16"),
    *("model.learned_positions=true", "training.max_iters=150", "logging.interval=50"),
)
BENCH = ("dataset=sudoku4", "puzzles=10", "blanks=[0.25,0.5]", "device=cpu")


@pytest.fixture
def cached(run, cache):
    return f"cache={cache}"


def test_the_benchmark_counts_puzzles_calls_and_what_each_order_solves(run, cached):
    assert run("train.py", *FOUR).code == 0
    result = run("bench.sudoku", "checkpoint=out/ckpt.pt", "steps=[0,2]", cached, *BENCH)
    assert result.code == 0, result.err
    rows = json.loads(Path("sudoku.json").read_text())["rows"]
    orders = ["margin", "margin, 2 steps", "confidence", "confidence, 2 steps", "threshold", "eb",
              "random", "left to right"]  # fmt: skip
    assert list(dict.fromkeys(row["order"] for row in rows)) == orders
    for row in rows:
        blanks = 16 * row["blanks"]
        assert 0 <= row["interval"][0] <= row["solved"] <= row["interval"][1] <= 1
        one_each = row["order"] in ("margin", "confidence", "random", "left to right")
        calls = blanks if one_each else 2 if "steps" in row["order"] else row["calls"]
        assert row["calls"] == calls and 1 <= calls <= blanks
    for theme in ("light", "dark"):
        assert "<svg" in Path(f"sudoku-{theme}.svg").read_text()
    result = run("bench.sudoku", "checkpoint=out/ckpt.pt", "dataset=sudoku6", cached)
    assert result.code == 2 and "knows no 6 x 6 grids" in result.err
    result = run("bench.sudoku", "checkpoint=out/ckpt.pt", "strategies=[foo]", cached, *BENCH)
    assert result.code == 2 and "sampling.strategy=foo is unknown" in result.err


def test_a_network_that_knows_the_solution_solves_every_puzzle(run, cached, monkeypatch):
    """Found by search: each strategy then fills in what it is given, and all are solved."""
    assert run("train.py", *FOUR, "training.max_iters=2").code == 0

    def solved(self, model, canvas, is_masked, **options):
        found = real(self, model, canvas, is_masked, **options)
        for row, blank in zip(found.ids, is_masked, strict=True):
            row.copy_(complete(row.masked_fill(blank, -1)))
        return found

    real = strategies.Sampler.fill
    monkeypatch.setattr(strategies.Sampler, "fill", solved)
    result = run("bench.sudoku", "checkpoint=out/ckpt.pt", cached, *BENCH)
    rows = json.loads(Path("sudoku.json").read_text())["rows"]
    assert result.code == 0 and {row["solved"] for row in rows} == {1.0}


def complete(row):
    """A solution of a 4 x 4 grid with -1 for its blanks, by search."""
    blanks = (row < 0).nonzero().flatten().tolist()
    if not blanks:
        return row if bench.is_solved(row.numpy()[None], 4)[0] else None
    members = sudoku.units(4)
    near = members[(members == blanks[0]).any(axis=1)]
    for digit in set(range(4)) - set(row.numpy()[near].flatten().tolist()):
        attempt = row.clone()
        attempt[blanks[0]] = digit
        if (found := complete(attempt)) is not None:
            return found
    return None


@pytest.mark.parametrize("objective", ["ar", "diffusion"])
def test_a_control_is_trained_on_pairs_and_asked_for_the_solution(objective, run, cached):
    result = run("bench.sudoku", "dataset=sudoku4", "pairs=p.jsonl", cached)
    assert result.code == 0, result.err
    pairs = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert all(bench.is_solution(pair["response"], pair["prompt"], 4) for pair in pairs)
    words = [*TINY, "data.path=p.jsonl", "model.block_size=34", f"training.objective={objective}"]
    assert run("train.py", *words).code == 0
    result = run("bench.sudoku", "checkpoint=out/ckpt.pt", "strategies=[margin]", cached, *BENCH)
    assert result.code == 0, result.err
    names = {row["order"] for row in json.loads(Path("sudoku.json").read_text())["rows"]}
    assert names == ({"autoregressive"} if objective == "ar" else {"margin", "margin, 8 steps"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("dataset=sudoku5",), "dataset=sudoku5: choose sudoku4, sudoku6, sudoku9"),
        (("blanks=[0]",), "blanks=0 must be a share of the cells"),
        (("blanks=[half]",), "blanks=half must be a share of the cells"),
        (("puzzles=0",), "puzzles must be at least 1"),
        (("seed=-1",), "seed and each of steps a number from 0 on"),
        (("steps=[x]",), "seed and each of steps a number from 0 on"),
    ],
)
def test_settings_out_of_range_are_refused(words, says, run, cached):
    result = run("bench.sudoku", "dataset=sudoku4", cached, *words)
    assert result.code == 2 and says in result.err


# --- As a grid ----------------------------------------------------------------------------------


def test_the_viewer_shows_a_square_of_rows_as_a_grid_with_its_boxes(run, cached):
    assert run("train.py", *FOUR, "training.max_iters=2").code == 0
    loaded = load_model("out/ckpt.pt")
    assert trace.grid_of(loaded, 16) == {"grid": [4, 2, 2]} and trace.grid_of(loaded, 15) == {}
    words = ("checkpoint=out/ckpt.pt", "prompt=1..4............", "blank=.", "device=cpu")
    assert run("tools.view", *words, "out=a.html").code == 0
    assert '"grid":[4,2,2]' in Path("a.html").read_text()
    assert run("tools.view", *words, "format=svg", "out=a.svg").code == 0
    assert "<svg" in Path("a.svg").read_text()


def test_a_text_is_no_grid(trained):
    assert trace.grid_of(load_model(trained / "ckpt.pt"), 16) == {}


def test_the_picture_has_gaps_between_boxes():
    places, _ = picture.lay_out_grid(36, 6, 2, 3)
    assert places[:6] == [(0, 0), (2, 0), (4, 0), (7, 0), (9, 0), (11, 0)]
    assert [row for _, row in places[::6]] == pytest.approx([0, 1, 7 / 3, 10 / 3, 14 / 3, 17 / 3])
