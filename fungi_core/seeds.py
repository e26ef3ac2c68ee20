"""Random generators named by keys: every draw is the same on every machine, in any order."""

import hashlib

import numpy as np


def generator(*keys: object) -> np.random.Generator:
    """Return the counter-based (Philox) generator that ``keys`` name."""
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def content_id(content: bytes) -> str:
    """Return a hash of an item's decoded content, by which its random views are drawn."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()
