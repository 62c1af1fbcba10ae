"""Text into ids and back: characters, bytes, byte-pair encodings.

Each has vocab_size, encode(text) -> int64 array, decode(ids) -> text, decode_bytes(ids) -> bytes
and state(): plain values from which load_tokenizer makes it again. None adds special tokens; eos
is the id that ends a text, if there is one.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from .errors import UserError, optional

EOT = "<|endoftext|>"  # the special token that ends a document, where a BPE has one


class CharTokenizer:
    """One token a character: those of the training text in the order of their code points."""

    eos = None

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters) or not characters or not _is_text(characters):
            raise UserError("its characters are none, or not all different")
        self.characters, self.vocab_size = characters, len(characters)
        self.ids = {c: i for i, c in enumerate(characters)}

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.fromiter((self.ids[c] for c in text), np.int64, len(text))
        except KeyError as error:
            c = error.args[0]
            raise UserError(
                f"the tokenizer has no character {c!r} (position {text.index(c)}), only the "
                f"{self.vocab_size} of its training text: leave it out or train with "
                "data.tokenizer=byte"
            ) from None

    def decode(self, ids) -> str:
        return "".join(self.characters[i] for i in ids)

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def state(self) -> dict:
        return {"kind": "char", "characters": self.characters}


class ByteLevel:
    """What tokenizers of bytes share: a token may be a part of a character."""

    eos = None

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")


class ByteTokenizer(ByteLevel):
    """One token a byte of UTF-8: any text, 256 tokens."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode_bytes(self, ids) -> bytes:
        return bytes(list(ids))  # of an array, bytes() would take the buffer

    def state(self) -> dict:
        return {"kind": "byte"}


class GPT2Tokenizer(ByteLevel):
    """GPT-2's byte-pair encoding (50,257 tokens) by tiktoken, which fetches its tables once."""

    def __init__(self):
        try:
            self.encoding = optional("tiktoken").get_encoding("gpt2")
        except OSError as error:
            raise UserError(
                f"tiktoken cannot fetch its GPT-2 tables ({type(error).__name__}): go online once, "
                "or point TIKTOKEN_CACHE_DIR at a folder that has them"
            ) from error
        self.vocab_size, self.eos = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int64)

    def decode_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes(list(ids))

    def state(self) -> dict:
        return {"kind": "gpt2"}


def byte_of_character() -> dict[str, int]:
    """How byte-level BPEs write each byte as a printable character: GPT-2's table, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class BPETokenizer(ByteLevel):
    """A byte-level BPE trained on the user's own text, by the `tokenizers` library."""

    def __init__(self, serialized: str):
        check_bpe(serialized)
        self.tokenizer = optional("tokenizers").Tokenizer.from_str(serialized)
        self.tokenizer.encode_special_tokens = True  # a text that spells one is text
        self.vocab_size, self.eos = self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id(EOT)
        self.bytes = byte_of_character()

    @classmethod
    def train(cls, text: str, vocab_size: int, special: Sequence[str] = ()) -> "BPETokenizer":
        if vocab_size < 256:
            raise UserError(f"data.vocab_size={vocab_size} must be at least 256: any byte is one")
        lib = optional("tokenizers")
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),  # so any text works
            show_progress=False,
        )
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids, dtype=np.int64)

    def decode_bytes(self, ids) -> bytes:
        return bytes(self.bytes[c] for i in ids for c in self.tokenizer.id_to_token(i))

    def state(self) -> dict:
        return {"kind": "bpe", "serialized": self.tokenizer.to_str()}


class HFTokenizer(ByteLevel):
    """A tokenizer.json that came with imported weights, for a network of `vocab_size` tokens.

    `mask` is the id that it has for the mask. Where that lies inside the vocabulary, the last token
    stands in its place, as the network's row does; all other ids are those of the file.
    """

    def __init__(self, serialized: str, vocab_size: int, mask: int, eos: int | None = None):
        check_hf(serialized, [vocab_size, mask, eos or 0])
        self.tokenizer = optional("tokenizers").Tokenizer.from_str(serialized)
        self.serialized, self.vocab_size, self.mask, self.eos = serialized, vocab_size, mask, eos
        self.bytes = byte_of_character() if '"ByteLevel"' in serialized else {}
        self.special = self.tokenizer.get_added_tokens_decoder()
        vocabulary = self.tokenizer.get_vocab()
        plain = (token for token, i in vocabulary.items() if i not in self.special)
        if self.bytes and set("".join(plain)) - self.bytes.keys():
            raise UserError("its tokens hold more than the signs of bytes")
        if max(vocabulary.values()) > vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.get_vocab_size()} tokens, the network "
                f"{vocab_size} and the mask: take the tokenizer that belongs to it"
            )

    def id_of(self, token: str | None) -> int | None:
        found = None if token is None else self.tokenizer.token_to_id(token)
        return self.mask if found == self.vocab_size else found

    def encode(self, text: str) -> np.ndarray:
        found = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids = np.array(found, dtype=np.int64)
        if (ids == self.mask).any():
            raise UserError(
                f"the text holds {self.tokenizer.id_to_token(self.mask)}, which is this model's "
                "mask: leave it out"
            )
        return np.where(ids == self.vocab_size, self.mask, ids)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(map(self._bytes, ids))

    def _bytes(self, i: int) -> bytes:
        i = self.vocab_size if i == self.mask else int(i)
        token = self.tokenizer.id_to_token(i)
        if token is None:  # rows that only fill the network up
            return "\ufffd".encode()
        if self.bytes and i not in self.special:
            return bytes(self.bytes[c] for c in token)
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # SentencePiece's sign for a space

    def state(self) -> dict:
        names = ("serialized", "vocab_size", "mask", "eos")
        return {"kind": "hf"} | {name: getattr(self, name) for name in names}


AROUND_BPE = ("normalizer", "post_processor", "truncation", "padding")
WITHIN_BPE = (
    *("dropout", "unk_token", "fuse_unk", "continuing_subword_prefix", "end_of_word_suffix"),
    *("byte_fallback", "ignore_merges"),
)


def check_bpe(serialized: str) -> None:
    """Raise `UserError` for what is no plain byte-level BPE with the ids 0 ... V - 1.

    The library would also take a regular expression that never ends or ids without a limit, and
    ends the process for a prefix that is longer than a token.
    """
    spec = json.loads(serialized)
    model, before = spec["model"], spec["pre_tokenizer"]
    plain = model["type"] == "BPE" and before["type"] == "ByteLevel"
    others = [before["add_prefix_space"], *(spec.get(name) for name in AROUND_BPE)]
    if not plain or any(others + [model.get(name) for name in WITHIN_BPE]):
        raise UserError("it is no plain byte-level BPE")
    tokens = model["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    if set(map(type, tokens.values())) != {int} or sorted(tokens.values()) != [*range(len(tokens))]:
        raise UserError("the ids of its tokens are not 0, 1, 2 and so on")
    if set("".join(tokens)) - byte_of_character().keys():
        raise UserError("its tokens hold more than the signs of bytes")


def check_hf(serialized: str, numbers: list) -> None:
    """Raise `UserError` for what ends the process, or for numbers that are none.

    Its regular expressions are run as they are: import what you trust.
    """
    model = json.loads(serialized)["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        raise UserError("it is no BPE of whole tokens")
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise UserError("its numbers are not whole ones")


def _is_text(characters: str) -> bool:
    """Whether it could be written to a file: half a character could not."""
    return not any("\ud800" <= c <= "\udfff" for c in characters)


TOKENIZERS = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "gpt2": GPT2Tokenizer,
    "bpe": BPETokenizer,
    "hf": HFTokenizer,
}


def load_tokenizer(state: dict):
    """The tokenizer whose `state()` this is. Raises `UserError` if it is none."""
    try:
        kind, values = state["kind"], {k: v for k, v in state.items() if k != "kind"}
        return TOKENIZERS[kind](**values)
    except Exception as error:  # the tokenizers library raises bare ones
        if isinstance(error, UserError):
            raise
        raise UserError(f"no tokenizer of this project ({error!r})") from error


def train_tokenizer(kind: str, text: str, split: int, vocab_size: int):
    """A tokenizer for `text`, whose training part ends at `split`.

    Characters are counted over the whole text, as in nanoGPT; a BPE sees the training part only.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set(text))))
    return BPETokenizer.train(text[:split], vocab_size) if kind == "bpe" else TOKENIZERS[kind]()
