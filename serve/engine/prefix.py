"""Content keys of KV pages: two pages have the same key only if their KV is the same.

The KV of a token depends on the base model, on the type it is stored in, on the adapter, and on the ids and edit masks
of all tokens so far. The first three are the request's salt; the keys of its pages chain over the rest. Every part is
length-prefixed, so no part can be read as another.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np


def cache_salt(*, base: str, kv_dtype: str, adapter: str | None, fold_version: int, salt: str | None = None) -> bytes:
    """Return what the KV of a request depends on besides its tokens and its edit mask.

    Args:
        base: digest of the base model and its quantisation.
        kv_dtype: how KV is stored, scales included.
        adapter: digest of the adapter's content, never its name; None for a request to the base model, which differs
            from every digest and from the empty string.
        fold_version: version of the arithmetic that folds adapters.
        salt: kept apart by it, though the KV is the same: whose it is; None differs from every text.
    """
    tagged = b"base" if adapter is None else b"adapter:" + adapter.encode()
    parts = (base.encode(), kv_dtype.encode(), tagged, str(fold_version).encode())
    parts += () if salt is None else (b"salt:" + salt.encode("utf-8", "surrogatepass"),)
    return b"".join(struct.pack("<q", len(part)) + part for part in parts)


class PageKeys:
    """The keys of one sequence's full pages, computed once each while the sequence grows.

    A key is the SHA-256 of the page before's key (of the salt, for the first page), the number of tokens in the page,
    their ids as little-endian int32, the number of groups and the packed bits of the edit mask.

    Args:
        salt: from ``cache_salt``.
        page_size: tokens in a page, at least 1.
    """

    def __init__(self, salt: bytes, page_size: int) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; it must be at least 1")
        self.page_size = page_size
        self._chain = [hashlib.sha256(salt).digest()]

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
            mask = struct.pack("<q", mask_TG.shape[1]) + np.packbits(mask_TG[start : start + size]).tobytes()
            self._chain.append(hashlib.sha256(self._chain[-1] + ids + mask).digest())
        return self._chain[1 : full + 1]
