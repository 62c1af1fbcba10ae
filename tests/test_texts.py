"""How texts become rows: windows, limits, what is predicted and what is context."""

import pytest
import torch

from nanomdm import texts
from nanomdm.errors import UserError
from nanomdm.tokenizers import ByteTokenizer, CharTokenizer

IDS = torch.arange(100).numpy()


def cut(*lengths: int, **settings) -> texts.Texts:
    documents = [(f"{n}.txt", IDS[:length]) for n, length in enumerate(lengths)]
    return texts.cut("", documents, ByteTokenizer(), **settings)


# --- Windows -------------------------------------------------------------------------------------


def test_windows_begin_where_blocks_do():
    for length in range(1, 60):
        for unit in (1, 2, 4, 8):
            found = texts.windows(length, 16, unit=unit)
            assert all(start % unit == 0 and 0 < stop - start <= 16 for start, stop, _ in found)
            assert [first for *_, first in found[1:]] == [stop for _, stop, _ in found[:-1]]
            assert found[-1][1] == length and all(start <= first for start, _, first in found)
    assert texts.windows(40, 16, unit=16) == texts.windows(40, 16)  # one block: as without


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23, 64])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_predict_every_token_once(length, stride):
    scored = [i for _, stop, first in texts.windows(length, 8, stride) for i in range(first, stop)]
    assert scored == list(range(length))


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_a_window_after_the_first_has_a_whole_context(stride):
    for start, stop, first in texts.windows(30, 8, stride)[1:]:
        assert stop - start == 8 and first - start >= 8 - stride


def test_windows_that_move_by_the_context_do_not_overlap():
    assert texts.windows(20, 8, 8) == [(0, 8, 0), (8, 16, 8), (16, 20, 16)]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 49, 100])
@pytest.mark.parametrize("context", [1, 2, 3, 32])
def test_without_a_stride_each_window_begins_with_half_of_the_one_before(length, context):
    found = texts.windows(length, context)
    assert [first for _, _, first in found][1:] == [stop for _, stop, _ in found][:-1]
    assert found[0][0] == 0 and found[-1][1] == length
    for start, stop, first in found[1:]:
        assert stop - start == context and first - start >= context // 2


# --- Rows ----------------------------------------------------------------------------------------


def test_the_windows_of_several_documents_move_by_half_the_context():
    found = cut(100, 20, context=32)
    assert [len(row) for row in found.rows] == [32, 32, 32, 32, 32, 32, 20]
    assert found.tokens == 120
    assert found.document.tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_the_windows_of_one_document_do_not_overlap():
    found = cut(100, context=32)
    assert [len(row) for row in found.rows] == [32, 32, 32, 4]
    assert all(where.all() for where in found.predict)


def test_context_does_not_count():
    """The context of a window is seen, not predicted: tokens and bytes are those of the text."""
    found = cut(100, 20, context=32)
    assert found.tokens == 120 and int(found.sizes.sum()) == 120
    predicted = [row[where] for row, where in zip(found.rows, found.predict, strict=True)]
    assert torch.cat(predicted).tolist() == [*IDS.tolist(), *IDS[:20].tolist()]


def test_a_part_of_a_text_is_spread_over_it():
    assert [int(row[0]) for row in cut(100, context=10, limit=30).rows] == [0, 30, 60]


@pytest.mark.parametrize("limit, tokens", [(1, 10), (25, 20), (100, 100), (1000, 100)])
def test_a_limit_gives_about_that_number_of_tokens_and_at_least_one_window(limit, tokens):
    assert cut(100, context=10, limit=limit).tokens == tokens


def test_bytes_are_those_of_utf_8():
    tokenizer = CharTokenizer("aé")
    found = texts.cut("", [("a", tokenizer.encode("aéé"))], tokenizer, context=8)
    assert found.sizes.tolist() == [5]


# --- Files ---------------------------------------------------------------------------------------


def test_a_folder_gives_a_document_for_each_file(tmp_path):
    for name in ("b.txt", "a.md"):
        (tmp_path / name).write_text(name)
    found = [(name, bytes(ids.tolist())) for name, ids in texts.read(tmp_path, ByteTokenizer())]
    assert found == [("a.md", b"a.md"), ("b.txt", b"b.txt")]


def test_a_text_that_the_tokenizer_lacks_symbols_for_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "b.txt").write_text("aab")
    with pytest.raises(UserError, match="b.txt: the tokenizer has no character 'b'"):
        texts.read(tmp_path, CharTokenizer("a"))
