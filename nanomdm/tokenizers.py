"""Text into ids and back: characters, bytes, byte-pair encodings.

A tokenizer is a class with one entry in `TOKENIZERS`, from which the choices of data.tokenizer
derive. `train(text, split, vocab_size)` makes one for a text whose training part ends at `split`;
with a further argument `ends`, it can make one that has an end token, which documents need. A class
with `trainable = False` comes with imported weights only. An object of it has

    vocab_size         the ids are 0 ... vocab_size - 1, none of them the mask's
    eos                the id that ends a document, or None; it stands for no text
    has_text           whether the ids stand for text, whose bytes count
    encode(text)       an int64 array; adds no special tokens; raises UserError for other symbols
    decode(ids)        a text; decode(encode(text)) == text
    decode_bytes(ids)  the same in UTF-8, in which a token may be a part of a character
    state()            plain values: "kind", its name in TOKENIZERS, and the arguments of its class
"""

import inspect
import json
import re
from itertools import chain

import numpy as np

from .errors import UserError, check_choice, optional

EOT = "<|endoftext|>"  # the special token that ends a document, where a BPE has one
BETWEEN_LINES = re.compile(r"(?<=\S\n)(?=\S)")  # GPT-2's pattern always divides a text here


class Tokenizer:
    """What the classes have in common, unless they say otherwise.

    Each has a `kind`, its name in `TOKENIZERS`, and keeps its `arguments` as attributes.
    """

    eos, trainable, has_text, arguments = None, True, True, ()

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int) -> "Tokenizer":
        return cls()

    def set_size(self, vocab_size: int, ends: bool) -> None:
        """The last of the `vocab_size` tokens is the end token, if documents have `ends`."""
        if type(ends) is not bool:
            raise UserError("expected ends to be true or false")
        self.vocab_size, self.ends = vocab_size, ends
        self.eos = vocab_size - 1 if ends else None

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def state(self) -> dict:
        return {"kind": self.kind} | {name: getattr(self, name) for name in self.arguments}


class CharTokenizer(Tokenizer):
    """One token a character: those of the training text in the order of their code points."""

    kind, arguments = "char", ("characters", "ends")

    def __init__(self, characters: str, ends: bool = False):
        characters.encode()  # raises for a lone surrogate
        self.ids = {c: i for i, c in enumerate(characters)}
        if not 0 < len(self.ids) == len(characters):
            raise UserError("the alphabet is empty or has duplicates")
        self.characters = characters
        self.set_size(len(characters) + ends, ends)

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int, ends: bool = False) -> "Tokenizer":
        """With the characters of the whole text, validation split included, as in nanoGPT."""
        return cls("".join(sorted(set(text))), ends)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.fromiter((self.ids[c] for c in text), np.int64, len(text))
        except KeyError as error:
            raise UserError(
                f"the tokenizer has no character {error} (position {text.index(error.args[0])}), "
                f"only the {len(self.characters)} of its training text: leave it out or train with "
                "data.tokenizer=byte"
            ) from None

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.characters[i : i + 1] for i in ids).encode()  # "" for the end token


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: any text, 256 tokens."""

    kind, arguments = "byte", ("ends",)

    def __init__(self, ends: bool = False):
        self.set_size(256 + ends, ends)

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int, ends: bool = False) -> "Tokenizer":
        return cls(ends)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode_bytes(self, ids) -> bytes:
        return bytes(i for i in ids if i != self.eos)


class IdTokenizer(Tokenizer):
    """Tokens that stand for no text, such as states of a game: ids, and written as numbers."""

    kind, has_text, arguments = "ids", False, ("vocab_size", "ends")

    def __init__(self, vocab_size: int, ends: bool = False):
        if type(vocab_size) is not int or vocab_size <= ends:
            raise UserError(f"data.vocab_size={vocab_size} must be positive")
        self.set_size(vocab_size, ends)

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int, ends: bool = False) -> "Tokenizer":
        return cls(vocab_size + ends, ends)

    def encode(self, text: str) -> np.ndarray:
        words, size = text.split(), self.vocab_size - self.ends
        if wrong := [w for w in words if not (w.isdecimal() and int(w) < size)]:
            raise UserError(
                f"{wrong[0]!r} is no id from 0 to {size - 1}: write ids below "
                "data.vocab_size with spaces between them"
            )
        return np.array(list(map(int, words)), np.int64)

    def decode_bytes(self, ids) -> bytes:
        return "".join(f"{i} " for i in ids if i != self.eos).encode()


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding (50,257 tokens) by tiktoken, which fetches its tables once."""

    kind = "gpt2"

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
        return np.array(self.encoding.encode_ordinary(text), np.int64)

    def decode_bytes(self, ids) -> bytes:
        return self.encoding.decode_bytes(list(ids))


def byte_of_character() -> dict[str, int]:
    """How byte-level BPEs write each byte as a printable character: GPT-2's table, inverted."""
    others = [b for b in range(256) if not chr(b).isprintable() or chr(b) == " "]
    return {chr(256 + others.index(b) if b in others else b): b for b in range(256)}


class BPETokenizer(Tokenizer):
    """A byte-level BPE trained on the user's own text, by the `tokenizers` library."""

    kind, arguments = "bpe", ("serialized",)

    def __init__(self, serialized: str):
        check_bpe(serialized)
        self.tokenizer = optional("tokenizers").Tokenizer.from_str(serialized)
        self.tokenizer.encode_special_tokens = True  # a text that spells one is text
        self.serialized, self.bytes = self.tokenizer.to_str(), byte_of_character()
        self.vocab_size, self.eos = self.tokenizer.get_vocab_size(), self.tokenizer.token_to_id(EOT)

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int, ends: bool = False) -> "Tokenizer":
        """On the training part of the text alone."""
        if vocab_size < 256:
            raise UserError(f"data.vocab_size={vocab_size} must be at least 256: any byte is one")
        lib = optional("tokenizers")
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT] * ends,
            initial_alphabet=sorted(byte_of_character()),  # so that any text works
            show_progress=False,
        )
        tokenizer.train_from_iterator(text[:split].splitlines(keepends=True), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Line by line, as a text takes 160 times its memory; no token crosses a line's end."""
        lines = (self.tokenizer.encode(line).ids for line in BETWEEN_LINES.split(text))
        return np.fromiter(chain.from_iterable(lines), np.int64)

    def decode_bytes(self, ids) -> bytes:
        return bytes(self.bytes[c] for i in ids for c in self.tokenizer.id_to_token(i))


class HFTokenizer(Tokenizer):
    """A tokenizer.json that came with imported weights, for a network of `vocab_size` tokens.

    `mask` is the id that it has for the mask. Where that lies inside the vocabulary, the last token
    stands in its place, as the network's row does; all other ids are those of the file. Its regular
    expressions are run as they are: import what you trust.
    """

    kind, arguments, trainable = "hf", ("serialized", "vocab_size", "mask", "eos"), False

    def __init__(self, serialized: str, vocab_size: int, mask: int, eos: int | None = None):
        self.serialized, self.vocab_size, self.mask, self.eos = serialized, vocab_size, mask, eos
        for i in (vocab_size, mask, eos or 0):
            if type(i) is not int or not 0 <= i <= vocab_size:
                raise UserError("expected mask and eos to be integers from 0 to vocab_size")
        model = json.loads(serialized)["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix"):  # ends the process
            raise UserError("expected a BPE without continuing_subword_prefix")
        self.tokenizer = optional("tokenizers").Tokenizer.from_str(serialized)
        self.special = self.tokenizer.get_added_tokens_decoder()
        self.bytes = byte_of_character() if '"ByteLevel"' in serialized else {}
        if max(self.tokenizer.get_vocab().values()) > vocab_size:
            raise UserError(
                f"the tokenizer has {self.tokenizer.get_vocab_size()} tokens, the network "
                f"{vocab_size} and the mask: take the tokenizer that belongs to it"
            )

    def encode(self, text: str) -> np.ndarray:
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        if self.mask in ids:
            raise UserError(
                f"the text holds {self.tokenizer.id_to_token(self.mask)}, which is this model's "
                "mask: leave it out"
            )
        return np.where(ids == self.vocab_size, self.mask, ids)

    def decode_bytes(self, ids) -> bytes:
        return b"".join(map(self._bytes, ids))

    def _bytes(self, i: int) -> bytes:
        i = self.vocab_size if i == self.mask else i
        token = self.tokenizer.id_to_token(i) or "\ufffd"  # for rows that only fill the network up
        if i not in self.special and self.bytes.keys() >= set(token):
            return bytes(self.bytes[c] for c in token)
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()  # SentencePiece's sign for a space


CHANGES = (  # what makes more of a byte-level BPE in a tokenizer.json
    "normalizer",
    "post_processor",
    "truncation",
    "padding",
    "dropout",
    "unk_token",
    "fuse_unk",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


def check_bpe(serialized: str) -> None:
    """Raise `UserError` for what is not a plain byte-level BPE with the ids 0 ... V - 1.

    The library would also take a regular expression that never ends or ids without a limit, and
    ends the process for a prefix that is longer than a token.
    """
    spec = json.loads(serialized)
    model, before = spec["model"], spec["pre_tokenizer"]
    plain = model["type"] == "BPE" and before["type"] == "ByteLevel"
    changed = any(part.get(name) for part in (spec, model) for name in CHANGES)
    if not plain or changed or before["add_prefix_space"]:
        raise UserError("expected a plain byte-level BPE")
    tokens = model["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
    if not tokens or sorted(tokens.values()) != [*range(len(tokens))]:
        raise UserError(f"expected the ids of its {len(tokens)} tokens to be 0, 1, 2 and so on")
    if set("".join(tokens)) - byte_of_character().keys():
        raise UserError("its tokens hold characters that stand for no byte")


TOKENIZERS = {
    "char": CharTokenizer,
    "byte": ByteTokenizer,
    "ids": IdTokenizer,
    "gpt2": GPT2Tokenizer,
    "bpe": BPETokenizer,
    "hf": HFTokenizer,
}


def choices() -> list[str]:
    """What data.tokenizer may be."""
    return [name for name, tokenizer in TOKENIZERS.items() if tokenizer.trainable]


def train_tokenizer(kind: str, text: str, split: int, vocab_size: int, ends: bool = False):
    """A tokenizer for `text`, whose training part ends at `split`; with an end token, if asked.

    Raises `UserError`.
    """
    check_choice("data.tokenizer", kind, choices())
    train = TOKENIZERS[kind].train
    can_end = {"ends": ends} if "ends" in inspect.signature(train).parameters else {}
    return train(text, split, vocab_size, **can_end)


def load_tokenizer(state: dict):
    """The tokenizer whose `state()` this is. Raises `UserError` if it is none."""
    try:
        arguments = dict(state)
        return TOKENIZERS[arguments.pop("kind")](**arguments)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones
        raise UserError(
            f"no tokenizer of this project ({error!r}): if it is one of your own, run the script "
            "that adds it"
        ) from error
