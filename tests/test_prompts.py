"""nanomdm/prompts.py: templates with blanks, batches of canvases, windows of long texts."""

import pytest
import torch

from nanomdm import prompts
from nanomdm.tokenizers import ByteTokenizer

# --- Templates ----------------------------------------------------------------------------------


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
def test_a_prompt_is_read_as_texts_and_blanks(prompt, pieces):
    assert prompts.parse(prompt) == pieces


def test_a_canvas_is_masked_where_its_template_is_blank():
    ids, is_masked, _ = prompts.make_canvas("a[MASK*2]b", 0, ByteTokenizer(), context=8)
    assert is_masked.tolist() == [False, True, True, False]
    assert ids[~is_masked].tolist() == [97, 98]


@pytest.mark.parametrize(("length", "expected"), [(0, 8), (5, 5), (20, 20)])
def test_a_prompt_without_blanks_is_continued_to_the_length_or_the_context(length, expected):
    ids, is_masked, _ = prompts.make_canvas("ab", length, ByteTokenizer(), context=8)
    assert ids[:2].tolist() == [97, 98] and not is_masked[:2].any()
    assert len(ids) == expected and is_masked[2:].all()


# --- Batches ------------------------------------------------------------------------------------


def canvases(*lengths: int) -> list[prompts.Canvas]:
    """Canvases of these lengths, each of ids of its own."""
    return [prompts.Canvas(torch.full((n,), i), torch.arange(n) > i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_each_canvas_is_in_one_batch_of_canvases_of_its_length(size):
    given, found = canvases(5, 9, 5, 5, 9, 7), {}
    for rows, ids, is_masked, _ in prompts.batches(given, size):
        assert 0 < len(rows) <= size
        found |= dict(zip(rows, zip(ids, is_masked, strict=True), strict=True))
    assert sorted(found) == list(range(6))
    for number, (ids, is_masked) in found.items():
        assert torch.equal(ids, given[number].ids)
        assert torch.equal(is_masked, given[number].is_masked)


def test_canvases_of_one_length_share_a_batch():
    batches = [rows for rows, *_ in prompts.batches(canvases(5, 9, 5, 5, 9), 64)]
    assert batches == [[0, 2, 3], [1, 4]]


@pytest.mark.parametrize(("length", "size"), [(0, 4), (4, 4), (9, 9)])
def test_a_template_goes_on_to_the_length_if_there_is_one(length, size):
    canvas = prompts.make_canvas("a[MASK*2]b", length, ByteTokenizer(), context=8)
    assert len(canvas.ids) == size
    assert canvas.is_masked.tolist() == [False, True, True, False, *[True] * (size - 4)]


@pytest.mark.parametrize(("vocab_size", "rows"), [(65, 64), (50_257, 5), (2**30, 1)])
def test_a_batch_has_as_many_rows_as_its_logits_leave_room_for(vocab_size, rows):
    assert prompts.rows_at_once(1024, vocab_size) == rows
