"""Text in, batches out: tokenizers, nanoGPT's .bin files, and their preparation."""

import hashlib
import importlib
import io
import json
import os
import pickle
import pickletools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

SPLITS = ("train", "val")
EOT = "<|endoftext|>"  # the special token that ends a document, where a BPE has one
META = {  # of meta.json; hashes of the files and of the rest may be missing
    **{"dtype": str, "tokenizer": dict, "tokens": dict, "corpus": str, "sha256": str},
    **{"shards": dict, "check": str},
}
SCANNED = 2**27  # tokens of train that are checked when it is opened; batches are, when drawn


# --- Tokenizers ---------------------------------------------------------------------------------
# Each has vocab_size, encode(text) -> int64 array, decode(ids) -> text, decode_bytes(ids) -> bytes
# and state(): plain values from which load_tokenizer makes it again. None adds special tokens; eos
# is the id that ends a text, if there is one.


class CharTokenizer:
    """One token a character: those of the training text in the order of their code points."""

    eos = None

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters) or not characters or not _is_text(characters):
            raise ValueError("its characters are none, or not all different")
        self.characters, self.vocab_size = characters, len(characters)
        self.ids = {c: i for i, c in enumerate(characters)}

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.fromiter((self.ids[c] for c in text), np.int64, len(text))
        except KeyError as error:
            c = error.args[0]
            raise ValueError(
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
            raise ValueError(
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
            raise ValueError(f"data.vocab_size={vocab_size} must be at least 256: any byte is one")
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
            raise ValueError("its tokens hold more than the signs of bytes")
        if max(vocabulary.values()) > vocab_size:
            raise ValueError(
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
            raise ValueError(
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
    """Raise `ValueError` for what is no plain byte-level BPE with the ids 0 ... V - 1.

    The library would also take a regular expression that never ends or ids without a limit, and
    ends the process for a prefix that is longer than a token.
    """
    spec = json.loads(serialized)
    model, before = spec["model"], spec["pre_tokenizer"]
    plain = model["type"] == "BPE" and before["type"] == "ByteLevel"
    others = [before["add_prefix_space"], *(spec.get(name) for name in AROUND_BPE)]
    if not plain or any(others + [model.get(name) for name in WITHIN_BPE]):
        raise ValueError("it is no plain byte-level BPE")
    tokens = model["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    if set(map(type, tokens.values())) != {int} or sorted(tokens.values()) != [*range(len(tokens))]:
        raise ValueError("the ids of its tokens are not 0, 1, 2 and so on")
    if set("".join(tokens)) - byte_of_character().keys():
        raise ValueError("its tokens hold more than the signs of bytes")


def check_hf(serialized: str, numbers: list) -> None:
    """Raise `ValueError` for what ends the process, or for numbers that are none.

    Its regular expressions are run as they are: import what you trust.
    """
    model = json.loads(serialized)["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        raise ValueError("it is no BPE of whole tokens")
    if set(map(type, numbers)) != {int} or min(numbers) < 0:
        raise ValueError("its numbers are not whole ones")


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
    """The tokenizer whose `state()` this is. Raises `ValueError` if it is none."""
    try:
        kind, values = state["kind"], {k: v for k, v in state.items() if k != "kind"}
        return TOKENIZERS[kind](**values)
    except Exception as error:  # the tokenizers library raises bare ones
        if type(error) is ValueError:
            raise
        raise ValueError(f"no tokenizer of this project ({error!r})") from error


def train_tokenizer(kind: str, text: str, split: int, vocab_size: int):
    """A tokenizer for `text`, whose training part ends at `split`.

    Characters are counted over the whole text, as in nanoGPT; a BPE sees the training part only.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set(text))))
    return BPETokenizer.train(text[:split], vocab_size) if kind == "bpe" else TOKENIZERS[kind]()


def optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"this needs a package that is missing: pip install {module.split('.')[0]}"
        ) from None


# --- Corpora ------------------------------------------------------------------------------------


class Shards:
    """Arrays of token ids, one after the other, behind the interface of one: length and slices."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, piece: slice) -> np.ndarray:
        start, stop, _ = piece.indices(len(self))
        first = min(int(np.searchsorted(self.ends, start, side="right")), len(self.parts) - 1)
        found = []
        for part, end in zip(self.parts[first:], self.ends[first:].tolist(), strict=True):
            offset = end - len(part)
            found.append(part[max(0, start - offset) : max(0, stop - offset)])
            if stop <= end:
                break
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class Corpus:
    """Token ids of two splits, memory-mapped, and what is needed to name and reproduce them."""

    name: str
    sha256: str  # of the text; of val.bin where it was prepared elsewhere
    tokenizer: object
    train: np.ndarray | Shards
    val: np.ndarray | Shards

    def batch(
        self, batch_size: int, block_size: int, generator: Generator, rows: Tensor | None = None
    ) -> Tensor:
        """Random blocks of the train split (B, L), int64; `rows` picks some of the `batch_size`."""
        starts = torch.randint(len(self.train) - block_size + 1, (batch_size,), generator=generator)
        starts = starts if rows is None else starts[rows]
        batch = np.stack([self.train[i : i + block_size] for i in starts.tolist()])
        check_ids(batch, self.tokenizer.vocab_size, "the train split")
        return torch.from_numpy(batch.astype(np.int64))

    def require(self, block_size: int) -> None:
        """Raise `ValueError` if the train split is shorter than one block."""
        if len(self.train) < block_size:
            raise ValueError(
                f"the train split of {self.name} has {len(self.train)} tokens, fewer than "
                f"model.block_size={block_size}: take a longer text or a smaller block"
            )


def blocks(tokens: np.ndarray | Shards, block_size: int, limit: int = 0) -> list[Tensor]:
    """The whole of `tokens` as rows (L,), int64, without overlap; the last may be shorter.

    With a `limit`, as many rows as hold so many tokens, spread evenly.
    """
    starts = range(0, len(tokens), block_size)
    if 0 < limit < len(tokens):
        keep = max(1, limit // block_size)
        starts = [starts[i * len(starts) // keep] for i in range(keep)]
    return [torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts]


def check_ids(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"{source} holds the token {int(tokens.max())}, beyond its vocabulary of {vocab_size}: "
            "it is damaged, or was made with another tokenizer"
        )


def prepare(
    text: str, name: str, kind: str, vocab_size: int, cache: Path, trained: object | None = None
) -> Corpus:
    """Tokenize `text`, 90% train and 10% val by characters (as nanoGPT), once for each recipe.

    The tokenizer is made as `kind` and `vocab_size` (bpe) say, unless a `trained` one is given.
    Raises `ValueError` for an unknown kind, and for text that the tokenizer lacks symbols for.
    """
    known = [name for name in TOKENIZERS if name != "hf"]  # which weights bring along
    if kind not in known and not (trained and trained.state()["kind"] == kind):
        raise ValueError(f"data.tokenizer={kind} is unknown: choose one of {', '.join(known)}")
    sha256 = sha256_of(text.encode())
    made = [kind, vocab_size if kind == "bpe" else 0]
    recipe = json.dumps([sha256, trained.state() if trained else made])
    folder = cache / f"{name}-{sha256_of(recipe.encode())[:12]}"
    if not (folder / "meta.json").is_file():
        split = int(0.9 * len(text))
        if not split:
            raise ValueError(f"{name} has {len(text)} characters: too few to train on")
        tokenizer = trained or train_tokenizer(kind, text, split, vocab_size)
        ids = {"train": tokenizer.encode(text[:split]), "val": tokenizer.encode(text[split:])}
        write_bins(folder, ids, tokenizer, {"corpus": name, "sha256": sha256})
    return open_bins(folder)


def write_bins(folder: Path, splits: dict[str, np.ndarray], tokenizer, about: dict) -> None:
    """Write split.bin for each split, uint16 or, for a large vocabulary, uint32; meta.json last."""
    dtype = dtype_of(tokenizer.vocab_size)
    for split, ids in splits.items():
        write_atomically(folder / f"{split}.bin", ids.astype(dtype).tobytes())
    counts = {split: len(ids) for split, ids in splits.items()}
    meta = about | {"dtype": dtype, "tokens": counts, "tokenizer": tokenizer.state()}
    meta["shards"] = {f"{k}.bin": sha256_of(ids.astype(dtype)) for k, ids in splits.items()}
    meta["check"] = digest(meta)
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())


def dtype_of(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def digest(meta: dict) -> str:
    """A hash of a meta.json but for its own `check`, whatever the order of the keys."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return sha256_of(json.dumps(rest, sort_keys=True).encode())


def open_bins(folder: Path, tokenizer: str = "char", trained: object | None = None) -> Corpus:
    """A folder of train.bin and val.bin with our meta.json, with nanoGPT's meta.pkl or with none.

    Instead of train.bin there may be any number of shards train_*.bin, in the order of their names;
    so of val.bin. Without a meta file the bins are uint16 and `tokenizer` has to say gpt2 or byte.
    Raises `ValueError`.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: check data.dir")
    meta = _read_meta(folder, trained.state()["kind"] if trained else tokenizer)
    try:
        own = load_tokenizer(meta["tokenizer"])
    except ValueError as error:
        raise ValueError(f"{folder}: {error}: prepare the data again") from error
    if trained is not None and own.state() != trained.state():
        raise ValueError(f"{folder} was made with another tokenizer than the checkpoint has")
    train, val = (_open_split(folder, split, meta, own.vocab_size) for split in SPLITS)
    sha256 = meta.get("sha256") or sha256_of(val[:].tobytes())
    return Corpus(meta.get("corpus", folder.name), sha256, own, train, val)


def _read_meta(folder: Path, tokenizer: str) -> dict:
    try:
        if (folder / "meta.json").is_file():
            meta = json.loads((folder / "meta.json").read_bytes())
            for key, kind in META.items():
                if not isinstance(meta.get(key, kind()), kind):
                    raise ValueError(f"its {key} is not of type {kind.__name__}")
            if meta["dtype"] not in ("uint16", "uint32"):
                raise ValueError("no dtype uint16 or uint32")
            if meta.get("check", expected := digest(meta)) != expected:
                raise ValueError("its checksum is wrong")
            if not (meta.get("corpus", "") + meta.get("sha256", "")).isprintable():
                raise ValueError("its names hold control characters")
            return meta | {"tokenizer": meta["tokenizer"]}
        if (folder / "meta.pkl").is_file():
            itos = read_plain_pickle((folder / "meta.pkl").read_bytes())["itos"]
            characters = "".join(itos[i] for i in range(len(itos)))
            return {"dtype": "uint16", "tokenizer": {"kind": "char", "characters": characters}}
    except Exception as error:  # a damaged pickle or JSON can fail in any way
        raise ValueError(
            f"the meta file in {folder} is damaged ({error}): prepare again"
        ) from error
    if tokenizer not in ("gpt2", "byte"):
        raise ValueError(
            f"{folder} has no meta.json or meta.pkl, and data.tokenizer={tokenizer}: say "
            "data.tokenizer=gpt2 or data.tokenizer=byte"
        )
    return {"dtype": "uint16", "tokenizer": {"kind": tokenizer}}


def read_plain_pickle(content: bytes):
    """What nanoGPT's meta.pkl holds: dicts, strings and numbers. Raises for anything else."""
    for opcode, value, _ in pickletools.genops(content):
        if "PUT" in opcode.name and value > len(content):  # pickle makes a table of this size
            raise pickle.UnpicklingError("it counts more values than it has")
    return PlainUnpickler(io.BytesIO(content)).load()


class PlainUnpickler(pickle.Unpickler):
    """Refuses whatever could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def _open_split(folder: Path, split: str, meta: dict, vocab_size: int) -> np.ndarray | Shards:
    whole, shards = folder / f"{split}.bin", sorted(folder.glob(f"{split}_*.bin"))
    if whole.is_file() and shards:
        raise ValueError(f"{folder} has both {whole.name} and {shards[0].name}: remove one of them")
    paths = shards or [whole]
    scanned = SCANNED // len(paths) if split == "train" else None  # all of val, which is read whole
    parts = [_open_bin(path, meta["dtype"], vocab_size, scanned) for path in paths]
    tokens = Shards(parts) if shards else parts[0]
    if len(tokens) != meta.get("tokens", {}).get(split, len(tokens)):
        name = f"{split}_*.bin" if shards else whole.name
        raise ValueError(
            f"{folder / name} is cut: {len(tokens)} tokens, not the {meta['tokens'][split]} of the "
            "meta file: prepare the data again"
        )
    hashes = meta.get("shards", {}) if len(tokens) <= SCANNED else {}
    for path, part in zip(paths, parts, strict=True):
        if path.name in hashes and hashes[path.name] != sha256_of(part):
            raise ValueError(f"the checksum of {path} is wrong: prepare the data again")
    return tokens


def _open_bin(path: Path, dtype: str, vocab_size: int, scanned: int | None) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing: prepare the data again, or check data.dir")
    tokens, rest = divmod(path.stat().st_size, np.dtype(dtype).itemsize)
    if not tokens or rest:
        raise ValueError(f"{path} is empty or cut ({tokens} tokens): prepare the data again")
    ids = np.memmap(path, dtype=dtype, mode="r")
    check_ids(ids[:scanned], vocab_size, str(path))
    return ids


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all, in a folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()
