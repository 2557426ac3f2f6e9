"""Content keys of KV pages: two pages have the same key only if their KV is the same.

The KV of a token depends on the base model, on the type it is stored in, on the ids and edit masks of all tokens so far
and, from the first edited token on, on the adapter. The first two are the request's salt; the keys of its pages chain
over the rest. The adapter is in the key of the first page that holds an edited token, and so in those of all that
follow it. Pages in front of it are the base model's: all adapters share them with it. Every part is length-prefixed,
so no part can be read as another.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np


def cache_salt(*, base: str, kv_dtype: str, salt: str | None = None) -> bytes:
    """Return what the KV of a request depends on besides its tokens, its edit mask and its adapter.

    Args:
        base: digest of the base model and its quantisation.
        kv_dtype: how KV is stored, scales included.
        salt: kept apart by it, though the KV is the same: whose it is; None differs from every text.
    """
    parts = (base.encode(), kv_dtype.encode())
    parts += () if salt is None else (b"salt:" + salt.encode("utf-8", "surrogatepass"),)
    return _joined(parts)


def adapter_salt(*, digest: str, fold_version: int, adapter_dtype: str) -> bytes:
    """Return what the KV from a request's first edited token on depends on besides.

    Args:
        digest: of the adapter's content, never its name.
        fold_version: version of the arithmetic that folds adapters.
        adapter_dtype: how its rank pages are stored, on the host and in the bank.
    """
    return _joined((b"adapter:" + digest.encode(), str(fold_version).encode(), adapter_dtype.encode()))


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<q", len(part)) + part for part in parts)


class PageKeys:
    """The keys of one sequence's full pages, computed once each while the sequence grows.

    A key is the SHA-256 of the page before's key (of the salt, for the first page), the number of tokens in the page,
    their ids as little-endian int32, the number of groups and the packed bits of the edit mask; and, for the first page
    that holds an edited token, of what the adapter adds.

    Args:
        salt: from ``cache_salt``.
        page_size: tokens in a page, at least 1.
        adapter: from ``adapter_salt``; None for the base model, whose mask is all false.
    """

    def __init__(self, salt: bytes, page_size: int, adapter: bytes | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be at least 1")
        self.page_size = page_size
        self._chain = [hashlib.sha256(salt).digest()]
        self._adapter = adapter
        self._is_edited = False

    def keys(self, tokens: Sequence[int], mask_TG: np.ndarray, num_tokens: int) -> list[bytes]:
        """Return the keys of all full pages among the first ``num_tokens`` tokens.

        Tokens and mask rows of earlier calls must not have changed: they are not looked at again.

        Args:
            tokens: ids of at least ``num_tokens`` tokens.
            mask_TG: the edit mask, bool, at least ``num_tokens`` rows.
            num_tokens: tokens whose KV is, or will be, there.

        Raises:
            ValueError: for fewer tokens or rows than ``num_tokens``, or a mask of another type or rank.
        """
        if mask_TG.ndim != 2 or mask_TG.dtype != bool:
            raise ValueError(f"the edit mask is {mask_TG.dtype}{list(mask_TG.shape)}; it must be bool [tokens, groups]")
        if not 0 <= num_tokens <= min(len(tokens), len(mask_TG)):
            raise ValueError(f"num_tokens is {num_tokens}, of {len(tokens)} tokens and {len(mask_TG)} mask rows")
        size, full = self.page_size, num_tokens // self.page_size
        for start in range((len(self._chain) - 1) * size, full * size, size):
            ids = struct.pack(f"<q{size}i", size, *tokens[start : start + size])
            bits = np.packbits(mask_TG[start : start + size]).tobytes()
            mask = struct.pack("<q", mask_TG.shape[1]) + bits
            self._chain.append(hashlib.sha256(self._chain[-1] + ids + mask + self._edits(bits, start)).digest())
        return self._chain[1 : full + 1]

    def _edits(self, bits: bytes, start: int) -> bytes:
        """Return what the adapter adds to the key of the page at ``start``: something to the first edited one's."""
        if self._is_edited or not bits.strip(b"\0"):
            return b""
        if self._adapter is None:
            raise ValueError(f"a token of the page from {start} on is edited, and there is no adapter")
        self._is_edited = True
        return self._adapter
