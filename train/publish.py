"""Hands a trained adapter to a live server: into the directory that it watches, or by its route for loading."""

import os
from pathlib import Path

import httpx

from preft_jax.adapters.adapter import Adapter
from preft_jax.errors import AdapterError
from preft_jax.io.adapter_files import save_adapter


def publish(adapter: Adapter, name: str, saved: Path, target: str, *, timeout: float = 120.0) -> str:
    """Let a server serve an adapter, in place of the one that has its name.

    Args:
        adapter: trained.
        name: that requests will select it by.
        saved: directory in which it lies; a server of ``http(s)://`` reads it there, so it must see that path.
        target: a directory, or a server's address. A server's admin key is taken from ``PREFT_ADMIN_KEY``.
        timeout: seconds for the server to load it.

    Returns:
        What happened, for people.

    Raises:
        AdapterError: if the directory cannot be written, or the server refuses or cannot be reached.
    """
    if not target.startswith(("http://", "https://")):
        save_adapter(Path(target) / name, adapter)
        return f"{name} is in {target}"
    key = os.environ.get("PREFT_ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"lora_name": name, "lora_path": str(saved.resolve()), "load_inplace": True}
    try:
        answer = httpx.post(f"{target.rstrip('/')}/v1/load_lora_adapter", json=body, headers=headers, timeout=timeout)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AdapterError(f"{target} cannot be reached: {error}; the adapter is in {saved}") from error
    if answer.status_code != 200:
        raise AdapterError(
            f"{target} does not take the adapter ({answer.status_code}): {_reason(answer)}; it is in {saved}"
        )
    return f"{name} is served by {target}"


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
