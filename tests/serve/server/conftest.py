"""A server with a tiny model in this process, for the tests of the API; other tests here do not ask for it."""

import time

import api_server
import httpx
import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def own(root, lively):
    """Return adapters by name; ``late`` is not registered."""
    return {
        name: api_server.adapter_directory(root, name, lively, seed)
        for seed, name in enumerate(("public", "alices", "late"))
    }


@pytest.fixture(scope="module")
def serving(lively, root, own):
    found = api_server.make_serving(lively, root)
    found.adapters.register("public", str(root / "public"))
    found.adapters.register("alices", str(root / "alices"), owner="alice")
    found.gate = api_server.Gate(found.engine.engine)
    return found


@pytest.fixture(scope="module")
def url(serving):
    with api_server.running(serving) as found:
        with httpx.Client(base_url=found) as client:
            while client.get("/ready").status_code != 200:
                assert client.get("/health").status_code == 200
                time.sleep(0.05)
        yield found


@pytest.fixture(scope="module")
def alice(url):
    with api_server.client(url, api_server.ALICE) as found:
        yield found


@pytest.fixture
def raw(url):
    headers = {"Authorization": f"Bearer {api_server.ALICE}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as found:
        yield found


@pytest.fixture
def gate(serving):
    yield serving.gate
    serving.gate.open()


@pytest.fixture(autouse=True)
def _leaves_nothing(request):
    yield
    if "serving" in request.fixturenames:
        serving = request.getfixturevalue("serving")
        api_server.until(lambda: api_server.is_idle(serving))
        assert serving.engine.num_waiting == 0
        assert serving.engine.alive
        assert serving.engine.engine.stats.recompiles == 0
