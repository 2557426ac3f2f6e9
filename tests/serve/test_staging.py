"""When adapters are copied to the device and when they are written: real books, a device that keeps a diary."""

import pytest

from preft_jax.config import PRESETS
from serve.adapters import AdapterBank, Columns, Known
from serve.staging import STRIKES, Staging, WriteError


class Diary:
    """A device that notes what it is told."""

    def __init__(self):
        self.lines = []
        self.broken = set()
        self.holds = {}

    def copy_adapters(self, loads):
        line = "copy " + " ".join(load.digest for load in loads)
        self.lines.append(line)
        if line in self.broken:
            raise OSError("the link is down")
        return [
            load._replace(slabs={site: [f"device {slab}" for slab in slabs] for site, slabs in load.slabs.items()})
            for load in loads
        ]

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


def copy_beside(staging):
    """What a call does between its arguments and itself."""
    copies = staging.copies()
    if copies is not None:
        copies()


def test_places_are_given_behind_one_call_copies_run_beside_the_next_and_are_written_behind_it():
    _, diary, staging = make()
    staging.settle(["a", "b"])
    assert diary.take() == []
    copies = staging.copies()
    assert diary.take() == []
    copies()
    assert diary.take() == ["copy a b"]
    staging.settle(["a", "b"])
    assert diary.take() == ["write a b"]
    assert staging.copies() is None


def test_a_call_waits_only_for_the_adapters_that_it_needs():
    bank, diary, staging = make()
    staging.settle(["a", "b"])
    for name in "bc":
        assert bank.acquire(name)
    staging.bring({"b", "c"})
    assert diary.take() == ["copy b c", "write b c"]
    staging.bring({"b", "c"})
    assert diary.take() == []
    copy_beside(staging)
    assert diary.take() == ["copy a"]
    assert bank.acquire("a")
    staging.bring({"a"})
    assert diary.take() == ["write a"]


def test_what_is_copied_ahead_is_bounded_and_the_next_prompts_come_first():
    bank, diary, staging = make(room=2)
    for expected in ([], ["copy a b", "write a b"], ["copy c d", "write c d"], []):
        copy_beside(staging)
        staging.settle("abcdef")
        assert diary.take() == expected, "the bank has four pages, and no nearer adapter goes for a later one"
    assert all(bank.acquire(name) for name in "abcd")


def test_what_has_a_place_ahead_can_lose_it_before_and_after_its_copy():
    bank, diary, staging = make(bank_pages=2)
    staging.settle(["a"])
    assert bank.acquire("b"), "a place ahead keeps nothing"
    staging.bring({"b"})
    copy_beside(staging)
    staging.settle(["a"])
    assert diary.take() == ["copy b", "write b"], "a's page is b's now"
    bank.release("b")
    staging.settle(["a"])
    copy_beside(staging)
    assert bank.acquire("c")
    staging.bring({"c"})
    staging.settle([])
    assert diary.take() == ["copy a", "copy c", "write c"]
    assert diary.holds == {("q", bank.place("c")["q"].pages[0]): "device c0"}


def test_a_place_taken_lost_and_taken_again_is_written_where_it_is_now():
    bank, diary, staging = make(bank_pages=3, pages=1)
    staging.settle(["a"])
    copy_beside(staging)
    for name in "bc":
        assert bank.acquire(name)
    bank.release("c")
    assert bank.acquire("a")
    staging.bring({"a", "b"})
    assert diary.holds[("q", bank.place("a")["q"].pages[0])] == "device a0"
    assert diary.holds[("q", bank.place("b")["q"].pages[0])] == "device b0"


def test_a_short_call_has_only_what_the_next_one_needs_copied_beside_it():
    _, diary, staging = make()
    staging.settle(["a", "b"])
    assert staging.copies({"c"}) is None
    copies = staging.copies({"b", "c"})
    copies()
    copy_beside(staging)
    assert diary.take() == ["copy b", "copy a"]


def test_after_a_reset_nothing_is_on_its_way():
    bank, diary, staging = make()
    staging.settle(["a", "b"])
    copy_beside(staging)
    staging.settle(["a", "b", "c"])
    bank.reset()
    staging.reset()
    copy_beside(staging)
    staging.settle([])
    assert diary.take() == ["copy a b", "write a b"]


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


def test_of_copies_that_fail_each_is_tried_alone():
    bank, diary, staging = make()
    diary.broken = {"copy b", "copy a b"}
    given_up = []
    for failed in (["a", "b"], ["b"], ["b"]):
        staging.settle(["a", "b"])
        with pytest.raises(WriteError) as error:
            copy_beside(staging)
        assert error.value.digests == failed
        assert isinstance(error.value.__cause__, OSError)
        given_up.append(staging.blame(error.value.digests))
        bank.reset()
        staging.reset()
    assert given_up == [None, None, "b"]
    assert diary.take() == ["copy a b", "copy a", "copy b", "copy a", "copy b"]


def test_many_adapters_that_a_call_waits_for_are_brought_a_few_at_a_time():
    """A cold bank must not need more memory for copies than was set aside."""
    bank, diary, staging = make("abcde", bank_pages=7, room=2)
    for name in "abcde":
        assert bank.acquire(name)
    staging.bring(set("abcde"))
    assert diary.take() == ["copy a b", "write a b", "copy c d", "write c d", "copy e", "write e"]
    assert staging.waits == 5


def test_what_had_to_go_again_takes_no_room_ahead():
    bank, diary, staging = make(bank_pages=2, room=1)
    staging.settle(["a"])
    assert bank.acquire("b")
    staging.bring({"b"})
    bank.release("b")
    staging.settle(["c"])
    assert diary.take() == ["copy b", "write b"]
    copy_beside(staging)
    assert diary.take() == ["copy c"]
