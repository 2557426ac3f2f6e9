"""When adapters are copied to the device and when they are written: real books, a device that keeps a diary."""

import pytest

from preft_jax.adapter import AdapterConfig
from preft_jax.config import PRESETS
from serve.adapters import AdapterBank, Columns, Known
from serve.staging import STRIKES, Staging, WriteError


class Diary:
    """A device that notes what it is told."""

    def __init__(self):
        self.lines = []
        self.broken = set()
        self.holds = {}

    def copy_adapter(self, load):
        self.lines.append(f"copy {load.digest}")
        if f"copy {load.digest}" in self.broken:
            raise OSError("the link is down")
        return load._replace(slabs={site: [f"device {slab}" for slab in slabs] for site, slabs in load.slabs.items()})

    def write_adapters(self, loads):
        self.lines.append("write " + " ".join(load.digest for load in loads))
        if any(load.digest in self.broken for load in loads):
            raise OSError("no room")
        for load in loads:
            for site, slabs in load.slabs.items():
                self.holds.update(zip([(site, page) for page in load.place[site].pages], slabs, strict=True))

    def take(self):
        lines, self.lines = self.lines, []
        return lines


def unused(adapter):
    raise AssertionError(adapter)


def make(names="abcdef", *, bank_pages=5, room=2, pages=1):
    bank = AdapterBank(PRESETS["tiny"], bank_pages, 4, unused)
    for name in names:
        bank.put(name, Known({"q": Columns((0,) * pages)}, {"q": [f"{name}{n}" for n in range(pages)]}))
    diary = Diary()
    return bank, diary, Staging(bank, diary, room)


def begin(staging, names):
    """Copy ahead what may be, as a call does."""
    copies = staging.ahead(names)
    if copies is not None:
        copies()


def test_copies_begin_when_the_call_says_so_and_are_written_behind_it():
    _, diary, staging = make()
    copies = staging.ahead(["a", "b"])
    assert diary.take() == []
    copies()
    assert diary.take() == ["copy a", "copy b"]
    staging.settle()
    assert diary.take() == ["write a b"]
    assert staging.ahead(["a", "b"]) is None


def test_a_call_waits_only_for_the_adapters_that_it_needs():
    bank, diary, staging = make()
    begin(staging, ["a", "b"])
    for name in "bc":
        assert bank.acquire(name)
    diary.take()
    staging.bring({"b", "c"})
    assert diary.take() == ["copy c", "write b c"]
    staging.bring({"b", "c"})
    assert diary.take() == []
    staging.settle()
    assert diary.take() == ["write a"]


def test_what_is_copied_ahead_is_bounded_and_the_next_prompts_come_first():
    bank, diary, staging = make(room=2)
    for expected in (["copy a", "copy b", "write a b"], ["copy c", "copy d", "write c d"], []):
        begin(staging, "abcdef")
        staging.settle()
        assert diary.take() == expected, "the bank has four pages, and no nearer adapter goes for a later one"
    assert all(bank.acquire(name) for name in "abcd")


def test_what_is_copied_ahead_can_be_given_up_again():
    bank, diary, staging = make(bank_pages=2)
    begin(staging, ["a"])
    assert bank.acquire("b"), "copying ahead keeps nothing"
    staging.bring({"b"})
    assert staging.ahead(["a"]) is None
    staging.settle()
    assert diary.take() == ["copy a", "copy b", "write b"], "a's page is b's now"
    assert diary.holds == {("q", bank.place("b")["q"].pages[0]): "device b0"}
    bank.release("b")
    begin(staging, ["a"])
    staging.settle()
    assert diary.take() == ["copy a", "write a"]
    assert list(diary.holds.values()) == ["device a0"]


def test_a_place_taken_lost_and_taken_again_is_written_where_it_is_now():
    bank, diary, staging = make(bank_pages=3, pages=1)
    begin(staging, ["a"])
    for name in "bc":
        assert bank.acquire(name)
    bank.release("c")
    assert bank.acquire("a")
    staging.bring({"a", "b"})
    assert diary.holds[("q", bank.place("a")["q"].pages[0])] == "device a0"
    assert diary.holds[("q", bank.place("b")["q"].pages[0])] == "device b0"


def test_after_a_reset_nothing_is_on_its_way():
    bank, diary, staging = make()
    begin(staging, ["a"])
    bank.reset()
    staging.reset()
    staging.settle()
    assert diary.take() == ["copy a"]


def test_of_several_that_cannot_be_written_the_one_that_fails_alone_twice_is_given_up():
    bank, diary, staging = make()
    diary.broken.add("b")
    given_up = []
    for _ in range(1 + STRIKES):
        for name in "abc":
            bank.acquire(name)
        with pytest.raises(WriteError) as error:
            staging.bring(set("abc"))
        given_up.append(staging.blame(error.value.digests))
        bank.reset()
        staging.reset()
    assert [name for name in given_up if name] == ["b"]
    diary.take()
    assert bank.acquire("a")
    staging.bring({"a"})
    assert diary.take() == ["copy a", "write a"]


def test_a_copy_that_fails_is_that_adapters_fault():
    _, diary, staging = make()
    diary.broken.add("copy b")
    with pytest.raises(WriteError) as error:
        begin(staging, ["a", "b"])
    assert error.value.digests == ["b"]
    assert staging.blame(error.value.digests) is None
    assert staging.blame(error.value.digests) == "b"


def test_the_books_refuse_what_can_never_be_served():
    bank, *_ = make(bank_pages=2)
    with pytest.raises(Exception, match="raise bank_pages"):
        bank.check(AdapterConfig(rank=32))
