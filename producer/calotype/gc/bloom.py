"""`BloomFilter`: a set of any number of texts in fixed memory (Bloom 1970).

It may report an unknown text as known, but never the reverse. Each filter has its own salt, so that
the next one does not repeat its mistakes.
"""

from __future__ import annotations

import hashlib
import secrets
import struct

_HASHES = struct.Struct("<4I")


class BloomFilter:
    """16 MiB by default: with ten million texts in it, it is wrong about 1 in 250 other texts."""

    def __init__(self, *, bits: int = 2**27) -> None:
        """`bits` is a power of two, at least 8."""
        self._mask = bits - 1
        self._bits = bytearray(bits // 8)
        self._salt = secrets.token_bytes(16)

    def add(self, text: str) -> None:
        for place in self._places(text):
            self._bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, text: str) -> bool:
        return all(self._bits[place >> 3] >> (place & 7) & 1 for place in self._places(text))

    def _places(self, text: str) -> list[int]:
        digest = hashlib.blake2b(text.encode(), digest_size=_HASHES.size, salt=self._salt).digest()
        return [number & self._mask for number in _HASHES.unpack(digest)]
