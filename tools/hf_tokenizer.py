"""Our tokenizers as tokenizer.json, the format of the `tokenizers` library.

Ids and texts are those of our tokenizers. In addition, "[MASK]" is read as the mask, id V, and the
end-of-text token as its id.
"""

import json

from nanomdm import tokenizers as ours
from nanomdm.errors import UserError, optional

MASK = "[MASK]"


def convert(tokenizer, vocab_size: int):
    """A `tokenizers.Tokenizer` with the ids of one of ours, and the mask as id `vocab_size`."""
    lib = optional("tokenizers")
    makers = {"char": characters, "byte": plain_bytes, "bpe": bpe, "gpt2": gpt2, "hf": imported}
    if tokenizer.kind not in makers:
        raise UserError(f"a tokenizer {tokenizer.kind} has no form for transformers: export others")
    converted = makers[tokenizer.kind](tokenizer, lib)
    if tokenizer.eos is not None:
        converted.add_special_tokens([converted.id_to_token(tokenizer.eos) or ours.EOT])
    converted.add_special_tokens([lib.AddedToken(MASK, normalized=False)])
    if converted.token_to_id(MASK) != vocab_size:
        raise UserError(f"the tokenizer already has a token {MASK} or an id {vocab_size}")
    return converted


def characters(tokenizer: ours.CharTokenizer, lib):
    ids = {c: i for i, c in enumerate(tokenizer.characters)}
    converted = lib.Tokenizer(lib.models.WordLevel(ids, unk_token=""))
    one = lib.Regex(r"[\s\S]")
    converted.pre_tokenizer = lib.pre_tokenizers.Split(one, behavior="isolated")
    converted.decoder = lib.decoders.Fuse()
    return converted


def plain_bytes(tokenizer: ours.ByteTokenizer, lib):
    ids = {c: b for c, b in ours.byte_of_character().items()}
    return byte_level(lib.Tokenizer(lib.models.BPE(ids, [])), lib, split=False)


def bpe(tokenizer: ours.BPETokenizer, lib):
    return byte_level(lib.Tokenizer.from_str(tokenizer.state()["serialized"]), lib)


def gpt2(tokenizer: ours.GPT2Tokenizer, lib):
    """From tiktoken's ranks: a merge makes a token out of two tokens of lower rank."""
    ranks = tokenizer.encoding._mergeable_ranks
    written = {b: c for c, b in ours.byte_of_character().items()}
    name = {token: "".join(written[b] for b in token) for token in ranks}
    merges = [
        (name[left], name[right])
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in [last_merge(token, rank, ranks)]
    ]
    ids = {name[token]: rank for token, rank in ranks.items()}
    ids[tokenizer.encoding.decode([tokenizer.eos])] = tokenizer.eos
    return byte_level(lib.Tokenizer(lib.models.BPE(ids, merges)), lib)


def last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts of a token that remain after the merges of a rank below `rank`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        i = min(range(len(pairs)), key=pairs.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def imported(tokenizer: ours.HFTokenizer, lib):
    """Its own file, padded to the size of the network.

    A mask inside the vocabulary exchanges its id with the last token, as the network's rows do.
    """
    spec, V, mask = json.loads(tokenizer.serialized), tokenizer.vocab_size, tokenizer.mask
    added, size = spec["added_tokens"], tokenizer.tokenizer.get_vocab_size()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for i in range(size, V):
        added.append({"id": i, "content": f"<|unused_{i}|>", "special": True} | plain)
    if mask < V:
        last = [token["content"] for token in added if token["id"] == V] or [f"<|unused_{mask}|>"]
        added[:] = [token for token in added if token["id"] != V]
        for token in added:
            token["content"] = last[0] if token["id"] == mask else token["content"]
    return lib.Tokenizer.from_str(json.dumps(spec))


def byte_level(converted, lib, split: bool = True):
    """Bytes are written as characters before the model and decoded after it."""
    level = lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    converted.pre_tokenizer, converted.decoder = level, lib.decoders.ByteLevel()
    return converted


def settings(converted, tokenizer, block_size: int) -> dict:
    """The contents of tokenizer_config.json, which `AutoTokenizer` reads."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": MASK,
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eos is not None:
        values["eos_token"] = converted.id_to_token(tokenizer.eos)
    return values
