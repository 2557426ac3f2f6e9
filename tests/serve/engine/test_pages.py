import collections
import copy
import itertools
import pickle
import random

import pytest

from serve.engine.pages import OutOfPages, PageManager

pytestmark = pytest.mark.host

A, B, C, D = b"a", b"b", b"c", b"d"


def registered(manager, keys):
    """Return fresh pages that are registered under ``keys``, as a request that has computed them holds them."""
    pages = manager.allocate(len(keys))
    for page, key in zip(pages, keys, strict=True):
        manager.register(page, key)
    return pages


def cached(manager, keys):
    """Return how many of the keys have a page."""
    return sum(len(manager.match([key])) for key in keys)


def counts(manager):
    return manager.num_available, manager.num_used, cached(manager, [A, B, C, D])


def refused(manager, method, *args, match, error=ValueError):
    """Check that a call raises and changes nothing."""
    before = pickle.dumps(manager)
    with pytest.raises(error, match=match) as info:
        getattr(manager, method)(*args)
    assert pickle.dumps(manager) == before
    return info.value


def test_a_new_pool_is_free():
    manager = PageManager(5, 16)
    assert (manager.num_pages, manager.page_size) == (5, 16)
    assert counts(manager) == (5, 0, 0)


@pytest.mark.parametrize("sizes", [(0, 16), (-1, 16), (4, 0)])
def test_a_pool_has_pages_and_pages_have_tokens(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        PageManager(*sizes)


def test_allocated_pages_are_distinct_and_held_once():
    manager = PageManager(4, 16)
    pages = manager.allocate(3)
    assert len(set(pages)) == 3
    assert set(pages) <= set(range(4))
    assert counts(manager) == (1, 3, 0)
    assert manager.allocate(0) == []
    manager.release(pages)
    assert counts(manager) == (4, 0, 0)


def test_the_longest_cached_prefix_matches_and_takes_no_reference():
    manager = PageManager(4, 16)
    a, b, d = registered(manager, [A, B, D])
    assert manager.match([A, B, C, D]) == [a, b]
    assert manager.match([A, B, D]) == [a, b, d]
    assert manager.match([C, A]) == []
    assert manager.match([]) == []
    manager.release([a, b, d])
    assert manager.match([A, B]) == [a, b]
    assert counts(manager) == (4, 0, 3)


def test_a_shared_page_is_used_until_its_last_reference_goes():
    manager = PageManager(2, 16)
    (a,) = registered(manager, [A])
    manager.acquire([a])
    manager.acquire([a, a])
    for _ in range(3):
        manager.release([a])
        assert counts(manager) == (1, 1, 1)
    manager.release([a])
    assert counts(manager) == (2, 0, 1)


def test_a_fork_may_share_pages_without_a_key():
    manager = PageManager(2, 16)
    pages = manager.allocate(2)
    manager.acquire(pages)
    manager.release(pages)
    assert counts(manager) == (0, 2, 0)
    manager.release(pages)
    assert counts(manager) == (2, 0, 0)


def test_a_reusable_page_is_revived_with_its_key():
    manager = PageManager(2, 16)
    pages = registered(manager, [A, B])
    manager.release(pages)
    manager.acquire(manager.match([A]))
    assert counts(manager) == (1, 1, 2)
    assert manager.allocate(1) == pages[1:]  # and the revived one is no longer in the way of eviction
    assert manager.match([A]) == pages[:1]
    assert manager.match([B]) == []


def test_free_pages_go_before_reusable_ones():
    manager = PageManager(4, 16)
    manager.release(registered(manager, [A, B]))
    manager.allocate(2)
    assert cached(manager, [A, B]) == 2
    manager.allocate(1)
    assert cached(manager, [A, B]) == 1


def test_the_least_recently_used_page_is_evicted_and_its_key_forgotten():
    manager = PageManager(3, 16)
    a, b, c = registered(manager, [A, B, C])
    for page in (b, a, c):
        manager.release([page])
    manager.acquire([b])  # used again: now the most recent
    manager.release([b])
    for page, key, left in ((a, A, 2), (c, C, 1), (b, B, 0)):
        assert manager.match([key]) == [page]
        assert manager.allocate(1) == [page]
        assert manager.match([key]) == []
        assert cached(manager, [A, B, C]) == left


def test_an_evicted_page_takes_a_new_key_and_its_old_key_a_new_page():
    manager = PageManager(2, 16)
    a, _ = registered(manager, [A, B])
    manager.release([a])
    assert manager.allocate(1) == [a]
    manager.register(a, C)
    assert manager.match([C]) == [a]
    assert manager.match([A]) == []
    manager.release([a])
    assert registered(manager, [A]) == [a]
    assert manager.match([A]) == [a]
    assert manager.match([C]) == []


def test_the_last_pages_of_a_request_are_evicted_before_its_first():
    manager = PageManager(4, 16)
    pages = registered(manager, [A, B, C, D])
    manager.release(pages)
    for length in (3, 2, 1):
        assert manager.allocate(1) == [pages[length]]
        assert manager.match([A, B, C, D]) == pages[:length]


def test_too_few_pages_change_nothing_and_say_how_many():
    manager = PageManager(4, 16)
    a, _ = registered(manager, [A, B])
    manager.release([a])
    raised = refused(manager, "allocate", 4, match="4 KV pages wanted, 3 available", error=OutOfPages)
    assert (raised.wanted, raised.available) == (4, 3)
    assert isinstance(raised, RuntimeError)
    assert manager.match([A]) == [a]
    assert len(manager.allocate(3)) == 3


def test_the_first_page_with_a_key_keeps_it():
    manager = PageManager(3, 16)
    first, second = manager.allocate(2)
    manager.register(first, A)
    manager.register(second, A)
    assert manager.match([A]) == [first]
    manager.release([second])
    manager.release([first])
    assert manager.match([A]) == [first]
    assert set(manager.allocate(2)) == {second, 3 - first - second}  # unkeyed, so free before the first is evicted
    assert manager.match([A]) == [first]


def test_an_unkeyed_copy_may_be_registered_once_the_key_is_gone():
    manager = PageManager(2, 16)
    first, second = manager.allocate(2)
    manager.register(first, A)
    manager.register(second, A)
    manager.release([first])
    manager.allocate(1)
    manager.register(second, A)
    assert manager.match([A]) == [second]


def test_registering_again_is_a_no_op_under_the_same_key_and_refused_under_another():
    manager = PageManager(2, 16)
    a, _ = registered(manager, [A, B])
    before = pickle.dumps(manager)
    manager.register(a, A)
    assert pickle.dumps(manager) == before
    refused(manager, "register", a, C, match=f"page {a} is registered under 61, cannot change it to 63")
    refused(manager, "register", a, B, match=f"page {a} is registered")  # whoever has the other key


def test_only_a_held_page_can_be_registered():
    manager = PageManager(2, 16)
    (a,) = registered(manager, [A])
    manager.release([a])
    refused(manager, "register", a, A, match=f"page {a} has no reference")
    refused(manager, "register", 1 - a, B, match=f"page {1 - a} has no reference")


def test_forget_frees_every_page():
    manager = PageManager(4, 16)
    pages = registered(manager, [A, B, C])
    manager.acquire(pages)
    manager.release(pages[:1] * 2)
    manager.forget()
    assert counts(manager) == (4, 0, 0)
    assert manager.match([A]) == []
    refused(manager, "release", [pages[1]], match=f"page {pages[1]} has 0 references")
    assert sorted(manager.allocate(4)) == [0, 1, 2, 3]


def test_misuse_names_the_page_and_changes_nothing():
    manager = PageManager(4, 16)
    a, b = registered(manager, [A, B])
    (c,) = manager.allocate(1)
    (d,) = manager.allocate(1)
    manager.release([b, d])  # a and c used, b reusable, d free
    for page in (b, d):
        refused(manager, "release", [a, page], match=f"page {page} has 0 references")
    refused(manager, "release", [c, a, c], match=f"page {c} has 1 references, cannot release 2")
    refused(manager, "acquire", [a, b, d], match=f"page {d} is free")
    for unknown in (-1, 4):
        refused(manager, "release", [a, unknown], match=f"page {unknown} does not exist")
        refused(manager, "acquire", [a, b, unknown], match=f"page {unknown} does not exist")
        refused(manager, "register", unknown, C, match=f"page {unknown} does not exist")
    refused(manager, "allocate", -1, match="-1 pages")


class Model:
    """What the book must say, kept as plain sets: who holds a page, what is written in it, when it was let go."""

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self.forget()

    def forget(self):
        self.holders = {page: set() for page in range(self.num_pages)}
        self.written = {}
        self.registry = {}
        self.let_go = {}

    @property
    def used(self):
        return {page for page, holders in self.holders.items() if holders}

    @property
    def reusable(self):
        """Unreferenced pages with a key, the least recently used first."""
        return sorted(set(self.registry.values()) - self.used, key=self.let_go.__getitem__)

    @property
    def free(self):
        return set(self.holders) - self.used - set(self.registry.values())

    def check_allocated(self, pages):
        """Check which pages an allocation chose, before they change hands."""
        free = self.free
        assert len(set(pages)) == len(pages)
        assert set(pages[: len(free)]) <= free
        assert pages[len(free) :] == self.reusable[: max(0, len(pages) - len(free))]

    def check_match(self, keys, pages):
        assert [self.written[page] for page in pages] == list(keys[: len(pages)])
        known = itertools.takewhile(self.registry.__contains__, keys)
        assert pages == [self.registry[key] for key in known]


class Request:
    def __init__(self, name, keys, pages):
        self.name, self.keys, self.pages = name, keys, pages


class Machine:
    """Random requests on a ``PageManager`` and on the model; keys are the text of the tokens so far."""

    def __init__(self, num_pages, seed):
        self.random = random.Random(seed)
        self.manager = PageManager(num_pages, 16)
        self.model = Model(num_pages)
        self.requests = []
        self.clock = itertools.count()  # names requests, too
        self.seen = collections.Counter()

    def chain(self, keys, length):
        keys = list(keys)
        for _ in range(length):
            keys.append((keys[-1] if keys else b"") + self.random.choice((A, A, B)))
        return keys

    def hold(self, request, pages):
        for page in pages:
            self.model.holders[page].add(request.name)

    def allocate(self, request, count):
        """Give a request fresh pages, which it writes at once; False if there are too few."""
        available = self.model.num_pages - len(self.model.used)
        if count > available:
            raised = refused(self.manager, "allocate", count, match="wanted", error=OutOfPages)
            assert (raised.wanted, raised.available) == (count, available)
            self.seen["out of pages"] += 1
            return False
        pages = self.manager.allocate(count)
        self.model.check_allocated(pages)
        for key, page in list(self.model.registry.items()):
            if page in pages:
                del self.model.registry[key]
                self.seen["evicted"] += 1
        request.pages += pages
        self.hold(request, pages)
        for key, page in zip(request.keys[-count:] if count else [], pages, strict=True):
            self.model.written[page] = key
        return True

    def acquire(self, request, pages):
        self.seen["revived"] += len(set(pages) - self.model.used)
        self.manager.acquire(pages)
        request.pages += pages
        self.hold(request, pages)

    def let_go(self, request):
        self.manager.release(request.pages)
        now = next(self.clock)
        for place, page in enumerate(request.pages):
            self.model.holders[page].remove(request.name)
            self.model.let_go[page] = (now, -place)  # within one release the last page is the oldest

    def admit(self):
        keys = self.chain([], self.random.randint(1, 5))
        request = Request(next(self.clock), keys, [])
        pages = self.manager.match(keys)
        self.model.check_match(keys, pages)
        self.seen["matched"] += len(pages)
        self.acquire(request, pages)
        if self.allocate(request, len(keys) - len(pages)):
            self.requests.append(request)
        else:
            self.let_go(request)

    def grow(self):
        if self.requests:
            request = self.random.choice(self.requests)
            keys, request.keys = request.keys, self.chain(request.keys, 1)
            if not self.allocate(request, 1):
                request.keys = keys

    def fork(self):
        if self.requests:
            parent = self.random.choice(self.requests)
            shared = self.random.randint(1, len(parent.pages))
            child = Request(next(self.clock), parent.keys[:shared], [])
            self.acquire(child, parent.pages[:shared])
            self.requests.append(child)
            self.seen["forked"] += 1

    def release(self):
        if self.requests:
            self.let_go(self.requests.pop(self.random.randrange(len(self.requests))))

    def register(self):
        if not self.requests:
            return
        request = self.random.choice(self.requests)
        for page, key in list(zip(request.pages, request.keys, strict=True))[: self.random.randint(1, 5)]:
            self.manager.register(page, key)
            if key in self.model.registry and self.model.registry[key] != page:
                self.seen["registered twice"] += 1
            self.model.registry.setdefault(key, page)

    def forget(self):
        if self.random.random() < 0.05:
            self.manager.forget()
            self.model.forget()
            self.requests = []
            self.seen["forgotten"] += 1

    def misuse(self):
        """Put one wrong page, or one page too often, among right ones."""
        used, reusable, free = sorted(self.model.used), self.model.reusable, sorted(self.model.free)
        unknown = [-1, -self.model.num_pages, self.model.num_pages, 10**9]
        page = self.random.choice(unknown + reusable + free)
        held = self.random.sample(used, min(len(used), 2))
        refused(self.manager, "release", [*held, page], match=f"page {page} ")
        refused(self.manager, "register", page, A, match=f"page {page} ")
        page = self.random.choice(unknown + free)
        refused(self.manager, "acquire", [*held, *reusable[:2], page], match=f"page {page} ")
        refused(self.manager, "allocate", -self.random.randint(1, 9), match="-")
        if used:
            page = self.random.choice(used)
            times = len(self.model.holders[page]) + 1
            refused(self.manager, "release", [page] * times, match=f"page {page} has {times - 1} ref")
            if page in self.model.registry.values():
                refused(self.manager, "register", page, b"other", match=f"page {page} is registered")

    def check(self):
        manager, model = self.manager, self.model
        used = len(model.used)
        assert used <= manager.num_pages
        assert (manager.num_used, manager.num_available) == (used, manager.num_pages - used)
        assert cached(manager, model.registry) == len(model.registry)

    def check_all(self):
        """Look at every page: what is not held can be allocated, and when everybody lets go nothing is left over."""
        manager, model = self.manager, self.model
        assert len(model.free) + len(model.reusable) + len(model.used) == manager.num_pages
        for length in range(1, 7):
            for text in itertools.product((A, B), repeat=length):
                assert bool(manager.match([b"".join(text)])) == (b"".join(text) in model.registry)
        for key, page in model.registry.items():
            assert manager.match([key]) == [page]
            assert model.written[page] == key
        other = copy.deepcopy(manager)
        pages = other.allocate(other.num_available)
        model.check_allocated(pages)
        assert set(pages) | model.used == set(range(manager.num_pages))
        other.release(pages)
        for request in self.requests:
            other.release(request.pages)
        assert (other.num_used, other.num_available) == (0, manager.num_pages)


@pytest.mark.parametrize("num_pages", [1, 3, 8, 20, 50])
def test_random_operations_agree_with_a_model(num_pages, rng):
    machine = Machine(num_pages, int(rng.integers(2**63)))
    operations = {"admit": 6, "grow": 4, "fork": 2, "register": 6, "release": 8, "forget": 1, "misuse": 1}
    names, weights = list(operations), list(operations.values())
    for step, name in enumerate(machine.random.choices(names, weights, k=24_000)):
        getattr(machine, name)()
        machine.check()
        if step % 100 == 0:
            machine.check_all()
    machine.check_all()
    # The run has met what it is for.
    common = {"out of pages", "evicted", "revived", "matched", "forked", "forgotten"}
    assert all(machine.seen[event] > 20 for event in common), machine.seen
    assert num_pages == 1 or machine.seen["registered twice"] > 20, machine.seen


def test_unregistered_pages_are_not_found_and_free_once_nobody_holds_them():
    manager = PageManager(4, 8)
    held, reusable = manager.allocate(2)
    manager.register(held, b"held")
    manager.register(reusable, b"reusable")
    manager.release([reusable])
    manager.unregister([held, reusable])
    assert manager.match([b"held"]) == manager.match([b"reusable"]) == []
    assert (manager.num_used, manager.num_available) == (1, 3)
    manager.release([held])
    assert manager.allocate(4)
    with pytest.raises(ValueError, match="page 9"):
        manager.unregister([9])
