import pytest

from preft_jax.errors import ConfigError
from serve.server.auth import Identity, Keys, RuntimeLoading, parse_keys, shown_owner
from serve.server.failures import ApiError

pytestmark = pytest.mark.host

ALICE, BOB, ROOT = "alice-key-1", "bob-key-22", "root-key-333"


def bearer(key):
    return b"Bearer " + key.encode()


def test_keys_and_their_users():
    assert parse_keys([f"alice={ALICE}", BOB, "=base64key=="]) == {ALICE: "alice", BOB: None, "base64key==": None}


@pytest.mark.parametrize(
    "item", ["short", "alice=short", "base64key==", "a b=longenough", "alice=has space", "=ключключ"]
)
def test_keys_that_cannot_work_are_refused_without_telling_them(item):
    with pytest.raises(ConfigError) as caught:
        parse_keys([item])
    assert item.rpartition("=")[2] not in str(caught.value) or not item.rpartition("=")[2]


def test_a_key_has_one_user():
    with pytest.raises(ConfigError, match="twice"):
        parse_keys([f"a={ALICE}", f"b={ALICE}"])
    with pytest.raises(ConfigError, match="admin"):
        Keys({ROOT: "a"}, ROOT)


def test_keys_tell_who_asks():
    keys = Keys({ALICE: "alice", BOB: None}, ROOT)
    assert keys.identify(bearer(ALICE)) == Identity("alice")
    assert keys.identify(b"bearer  " + ALICE.encode()) == Identity("alice")
    assert keys.identify(bearer(BOB)) == Identity()
    assert keys.identify(bearer(ROOT)).admin


@pytest.mark.parametrize(
    "header",
    [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong-key-1", b"Basic " + ALICE.encode(), ALICE.encode(), b"\xff\xfe"],
)
def test_nobody_else_is_let_in(header):
    with pytest.raises(ApiError) as caught:
        Keys({ALICE: "alice"}, ROOT).identify(header)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers["WWW-Authenticate"] == "Bearer"


def test_without_keys_everybody_is_let_in_and_the_admin_is_known():
    keys = Keys({}, ROOT)
    assert keys.identify(None) == Identity()
    assert keys.identify(b"Bearer whatever") == Identity()
    assert keys.identify(bearer(ROOT)).admin


def test_adapters_are_seen_by_their_owner_and_the_admin():
    assert Identity("alice").sees("alice")
    assert Identity("alice").sees(None)
    assert Identity().sees(None)
    assert Identity("admin", admin=True).sees("alice")
    assert not Identity("bob").sees("alice")
    assert not Identity().sees("alice")
    assert not Identity("admin").sees("alice")


def test_what_a_key_makes_is_its_users_or_its_own():
    keys = Keys({"alices-key": "alice", "alices-other": "alice", "adminlike": "admin", "nobodys-1": None,
                 "nobodys-2": None}, ROOT)  # fmt: skip
    alice, same, namesake, one, two, admin = (
        keys.identify(bearer(key))
        for key in ("alices-key", "alices-other", "adminlike", "nobodys-1", "nobodys-2", ROOT)
    )
    assert alice.owner == same.owner == "alice"
    everyone = (alice, namesake, one, two, admin)
    assert len({who.owner for who in everyone}) == 5
    for who in everyone:
        for owner in (other.owner for other in everyone):
            assert who.sees(owner) == who.changes(owner) == (who is admin or owner == who.owner)
        assert who.sees(None)
        assert who.changes(None) == (who is admin)
    assert (Identity().owner, Identity().changes(None), Identity().changes("alice")) == (None, True, False)
    assert [shown_owner(owner) for owner in ("alice", None, one.owner)] == ["alice", "preft-jax", "preft-jax"]
    assert "nobodys-1" not in str(one)


def refused(call, *args):
    with pytest.raises(ApiError) as caught:
        call(*args)
    return caught.value


def test_loading_is_off_without_roots_and_the_admins_with(tmp_path):
    admin = Identity("admin", admin=True)
    assert refused(RuntimeLoading().check, admin).status == 403
    loading = RuntimeLoading([tmp_path])
    assert refused(loading.check, Identity("alice")).code == "admin_only"
    loading.check(admin)
    with pytest.raises(ConfigError, match="no directory"):
        RuntimeLoading([tmp_path / "none"])


def test_paths_stay_under_their_roots(tmp_path):
    root, other, outside = tmp_path / "root", tmp_path / "other", tmp_path / "outside"
    for directory in (root / "good", other / "second", outside / "secret", tmp_path / "rootless"):
        directory.mkdir(parents=True)
    (outside / "secret" / "file").write_text("x")
    (root / "good" / "weights").write_text("x")
    (root / "inner").symlink_to(root / "good")
    (root / "outer").symlink_to(outside / "secret")
    (root / "leaky").mkdir()
    (root / "leaky" / "weights").symlink_to(outside / "secret" / "file")
    (root / "broken").mkdir()
    (root / "broken" / "weights").symlink_to(root / "nowhere")
    (tmp_path / "alias").symlink_to(root)
    loading = RuntimeLoading([tmp_path / "alias", other])
    good = (root / "good").resolve()
    for path in ("good", "./good/../good", "inner", str(root / "good"), str(tmp_path / "alias" / "good")):
        assert loading.resolve(path) == good
    assert loading.resolve("second") == (other / "second").resolve()
    wrong = ("../outside/secret", str(outside / "secret"), "outer", "leaky", "broken", "nowhere", "/", "/etc/passwd",
             "..", "good/weights", "a\0b", "x" * 5000, str(tmp_path / "rootless"), "~")  # fmt: skip
    messages = {refused(loading.resolve, path).message for path in wrong}
    assert len(messages) == 1
