"""Randomness without state: every generator is a function of (seed, purpose, step)."""

import hashlib

from torch import Generator


def generator(seed: int, purpose: str, step: int = 0) -> Generator:
    """A CPU generator for (seed, purpose, step): an exact resume needs no saved generator state."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
