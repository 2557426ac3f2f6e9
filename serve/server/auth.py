"""Who asks, which adapters they see, and where adapters may be loaded from."""

import dataclasses
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from preft_jax.errors import ConfigError
from serve.server.failures import ApiError

_LEAST_KEY = 8
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose request it is: a user's, nobody's in particular (``None``), or the admin's, who sees everything.

    Attributes:
        user: whose adapters it sees.
        admin: whether it sees everything.
        tenant: apart from whom it is kept, in the prefix cache and in the queue: a user, or a key without one; None:
            there are no keys.
    """

    user: str | None = None
    admin: bool = False
    tenant: str | None = dataclasses.field(default=None, compare=False)

    @property
    def owner(self) -> str | None:
        """Owner of what it makes: its user, or its key where that has none; None: there are no keys."""
        return self.tenant if self.admin or self.user is None else self.user

    def sees(self, owner: str | None) -> bool:
        """Whether what has this owner is there for them; what has none is everybody's."""
        return owner is None or self.admin or owner in (self.user, self.owner)

    def changes(self, owner: str | None) -> bool:
        """Whether they may change what has this owner; what has none is the admin's to change, where there are keys."""
        return self.admin or owner == self.owner


def parse_keys(items: Iterable[str]) -> dict[str, str | None]:
    """Parse ``[USER=]KEY`` items to users by key; ``=KEY`` is a key without a user that holds ``=``.

    Raises:
        ConfigError: for a user's name or a key that cannot work; no message repeats a key.
    """
    found: dict[str, str | None] = {}
    for item in items:
        user, equals, key = item.partition("=")
        if not equals:
            user, key = "", item
        if user and not _USER.fullmatch(user):
            raise ConfigError("an API key's user is not allowed; give letters, digits and . _ @ - only, as USER=KEY")
        if len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            whose = f"of {user!r} " if user else ""
            raise ConfigError(
                f"an API key {whose}has {len(key)} characters; give at least {_LEAST_KEY} printable ASCII ones without "
                "spaces, and write a key that holds '=' as USER=KEY or =KEY"
            )
        if key in found:
            raise ConfigError("an API key is given twice; each key has one user")
        found[key] = user or None
    return found


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _tenant(user: str | None, key: str) -> str:
    return f"key:{_hash(key.encode()).hex()}" if user is None else f"user:{user}"


class Keys:
    """The keys that are let in.

    Args:
        users: users by key; empty: everybody is let in, as nobody in particular.
        admin: the admin's key, or None.
    """

    def __init__(self, users: Mapping[str, str | None], admin: str | None = None):
        if admin is not None:
            (admin,) = parse_keys([f"={admin}"])
        if admin in users:
            raise ConfigError("the admin's key is also a user's; give the admin a key of its own")
        self._known = [(_hash(key.encode()), Identity(user, tenant=_tenant(user, key))) for key, user in users.items()]
        self.open = not self._known
        if admin is not None:
            tenant = _tenant(None, admin)
            self._known.append((_hash(admin.encode()), Identity("admin", admin=True, tenant=tenant)))

    def identify(self, authorization: bytes | None) -> Identity:
        """Return whose an ``Authorization`` header is.

        Every key is compared, each in constant time, so that the time tells nothing.

        Raises:
            ApiError: 401, if keys are needed and it has none that is known.
        """
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _hash(key.strip())
        found = None
        for known, identity in self._known:
            if hmac.compare_digest(known, given):
                found = identity
        if found is not None and scheme.lower() == b"bearer":
            return found
        if self.open:
            return Identity()
        what = "the API key is not known" if authorization else "there is no API key"
        raise ApiError(
            401,
            f"{what}; send the header 'Authorization: Bearer KEY' with one of the server's keys",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def shown_owner(owner: str | None) -> str:
    """Return an owner as answers name it: a user, or nobody in particular."""
    return "preft-jax" if owner is None or owner.startswith("key:") else owner


def require_figures(keys: Keys, identity: Identity) -> None:
    """Raise an ``ApiError`` (403) for who may not see figures in which all tenants' requests are counted."""
    if not keys.open and not identity.admin:
        raise ApiError(
            403,
            "these figures count the requests of all keys, and so are the admin's; ask with --admin-key's key",
            code="admin_only",
        )


class RuntimeLoading:
    """Where adapters may be loaded from while the server runs, and who may do it: the admin.

    Args:
        roots: directories; empty: nothing is loaded.

    Raises:
        ConfigError: if a root is no directory.
    """

    def __init__(self, roots: Sequence[Path] = ()):
        for root in roots:
            if not root.is_dir():
                raise ConfigError(f"--adapter-root is {root}, which is no directory; give one that exists")
        self._roots = [Path(os.path.realpath(root)) for root in roots]

    def check(self, identity: Identity) -> None:
        """Raise an ``ApiError`` (403) unless this one may load and unload adapters."""
        if not self._roots:
            raise ApiError(
                403,
                "adapters cannot be loaded while this server runs; start it with --allow-runtime-lora-updating, "
                "--adapter-root and --admin-key",
                code="loading_disabled",
            )
        if not identity.admin:
            raise ApiError(403, "only the admin's key may load and unload adapters", code="admin_only")

    def resolve(self, path: str) -> Path:
        """Return the real path of an adapter directory; a relative one is looked for under each root.

        Raises:
            ApiError: 400, if it does not exist or leads out of the roots, itself or by a link in it: one message for
                all, so that it does not tell what exists elsewhere.
        """
        for root in self._roots:
            try:
                real = Path(os.path.realpath(root / path, strict=True))
                if self._holds(real) and all(self._holds(_real(entry)) for entry in real.iterdir()):
                    return real
            except (OSError, ValueError):
                continue
        raise ApiError(
            400,
            "lora_path is no directory under the server's adapter roots, or holds a link that leads out of them; give "
            "the path of an adapter that lies there",
            code="path_not_allowed",
            param="lora_path",
        )

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path, strict=True))
