"""Sudoku: solved grids by a seeded generator, and the cells of rows, columns and boxes.

A grid of size n is a row of n * n digits 0 ... n - 1, from left to right and from top to bottom.
"""

import random

import numpy as np

DATASETS = {"sudoku4": (4, 200), "sudoku6": (6, 100_000), "sudoku9": (9, 100_000)}  # size, grids
VARIANTS = 50  # of each grid that the generator finds
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box


def units(size: int) -> np.ndarray:
    """(3 n, n): the cells of each row, column and box."""
    rows, columns = BOXES[size]
    cells = np.arange(size * size).reshape(size, size)
    boxes = cells.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2)
    return np.concatenate((cells, cells.T, boxes.reshape(size, size)))


def solve(size: int, seed: int) -> list[int]:
    """A solved grid: the cell with the fewest digits left gets a random one of them, and so on."""
    rng, members = random.Random(seed), units(size).tolist()
    peers = [{i for unit in members if cell in unit for i in unit} for cell in range(size * size)]
    grid = [-1] * size * size

    def fill(open_cells: dict) -> bool:
        if not open_cells:
            return True
        cell = min(open_cells, key=lambda c: len(open_cells[c]))
        for digit in rng.sample(sorted(open_cells[cell]), len(open_cells[cell])):
            rest = {
                c: left - {digit} if c in peers[cell] else left
                for c, left in open_cells.items()
                if c != cell
            }
            grid[cell] = digit
            if all(rest.values()) and fill(rest):
                return True
        return False

    fill({cell: frozenset(range(size)) for cell in range(size * size)})
    return grid


def shuffled(grid: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, n * n): the grid with its digits renamed, and bands, stacks and lines exchanged."""
    rows, columns = BOXES[size]
    names = rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)

    def order(lines: int) -> np.ndarray:  # (count, n): bands of so many lines, and each's lines
        bands = rng.permuted(np.tile(np.arange(size // lines), (count, 1)), axis=1)
        within = rng.permuted(np.tile(np.arange(lines), (count, size // lines, 1)), axis=2)
        return (bands[:, :, None] * lines + within).reshape(count, size)

    cells = order(rows)[:, :, None] * size + order(columns)[:, None, :]
    return np.take_along_axis(names, grid[cells].reshape(count, -1), axis=1)


def lines(size: int, count: int) -> str:
    """`count` different grids, less a few that came twice, a line of digits 1 ... n each.

    The first and the last ones are not variants of one grid, where there are that many: for n = 9.
    """
    rng = np.random.default_rng(size)
    grids = np.concatenate(
        [
            shuffled(np.array(solve(size, seed)), size, VARIANTS, rng)
            for seed in range(count // VARIANTS)
        ]
    )
    return "".join(dict.fromkeys("".join(map(str, grid)) + "\n" for grid in (grids + 1).tolist()))
