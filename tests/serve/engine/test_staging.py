"""When adapters are copied to the device and when they are written: real books, a device that keeps a diary."""

import types

import pytest

from serve.engine.observer import Observer
from serve.engine.recovery import STRIKES
from serve.engine.residency import Residency
from serve.engine.staging import Staging, WriteError
from serve.store.host_copy import Columns, Known

pytestmark = pytest.mark.host


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


def known(name, pages=1):
    return Known({"q": Columns((0,) * pages)}, {"q": [f"{name}{n}" for n in range(pages)]})


def make(names="abcdef", *, bank_pages=5, room=2, pages=1, observer=None):
    bank = Residency(bank_pages, lambda adapter: known(adapter.digest))
    for name in names:
        bank.put(name, known(name, pages))
    diary = Diary()
    return bank, diary, Staging(bank, diary, room, observer)


def copy_beside(staging, digests):
    """What a call does between its arguments and itself."""
    copies = staging.copies(digests)
    if copies is not None:
        copies()


def test_copies_run_beside_a_call_and_are_written_behind_it():
    _, diary, staging = make()
    copies = staging.copies(["a", "b"])
    assert diary.take() == []
    copies()
    assert diary.take() == ["copy a b"]
    staging.settle(["a", "b"])
    assert diary.take() == ["write a b"]
    assert staging.copies(["a", "b"]) is None


def test_a_call_waits_only_for_the_adapters_that_it_needs():
    bank, diary, staging = make(room=3)
    copy_beside(staging, ["a", "b"])
    for name in "bc":
        assert bank.acquire(name)
    assert diary.take() == ["copy a b"]
    staging.bring({"b", "c"})
    assert diary.take() == ["write b", "copy c", "write c"]
    assert staging.waits == 1
    staging.bring({"b", "c"})
    assert diary.take() == []
    assert bank.acquire("a")
    staging.bring({"a"})
    assert diary.take() == ["write a"]
    assert staging.waits == 1


def test_what_is_copied_ahead_is_bounded_and_the_next_prompts_come_first():
    bank, diary, staging = make(room=2)
    for expected in (["copy a b", "write a b"], ["copy c d", "write c d"], ["copy e f"], []):
        copy_beside(staging, "abcdef")
        staging.settle("abcdef")
        assert diary.take() == expected, "the bank has four pages, and no nearer adapter goes for a later one"
    assert all(bank.acquire(name) for name in "abcd")


def test_a_bank_that_one_call_fills_is_no_reason_to_wait():
    bank, diary, staging = make(bank_pages=3, room=2)
    calls = ["ab", "cd", "ef", "ab"]
    for now, then in zip(calls, [*calls[1:], ""], strict=True):
        assert all(bank.acquire(name) for name in now)
        staging.bring(set(now))
        copy_beside(staging, then)
        staging.settle(then)
        assert [diary.holds["q", bank.place(name)["q"].pages[0]] for name in now] == [f"device {n}0" for n in now]
        for name in now:
            bank.release(name)
    assert diary.take()[:6] == ["copy a b", "write a b", "copy c d", "write c d", "copy e f", "write e f"]
    assert staging.waits == 2, "nothing ran beside which the first ones could be copied"


def test_what_is_copied_ahead_is_dropped_once_no_prompt_wants_it():
    _, diary, staging = make(bank_pages=2, room=2)
    copy_beside(staging, "ab")
    staging.settle("a")
    copy_beside(staging, "acd")
    assert diary.take() == ["copy a b", "write a", "copy c d"]


def test_copies_ahead_make_room_for_those_that_a_call_needs():
    bank, diary, staging = make(bank_pages=5, room=2)
    copy_beside(staging, "ab")
    for name in "cd":
        assert bank.acquire(name)
    staging.bring(set("cd"))
    assert diary.take() == ["copy a b", "copy c d", "write c d"]


def test_a_place_can_be_lost_before_it_is_written():
    bank, diary, staging = make(bank_pages=2)
    assert bank.acquire("a")
    bank.release("a")
    copy_beside(staging, "a")
    assert bank.acquire("b"), "a place ahead keeps nothing"
    staging.bring({"b"})
    bank.release("b")
    assert diary.take() == ["copy a", "copy b", "write b"]
    staging.settle("a")
    assert diary.take() == ["write a"]
    assert diary.holds == {("q", bank.place("a")["q"].pages[0]): "device a0"}


def test_a_place_lost_to_another_before_its_copy_begins_is_not_copied_for_a_request_that_ended():
    bank, diary, staging = make("b", bank_pages=2)
    bank.claim(1, types.SimpleNamespace(digest="a"))
    assert bank.acquire("a")
    bank.release("a")
    bank.give_back(1, "a")
    begin = staging.copies("b")
    assert bank.acquire("b")
    begin()
    assert diary.take() == ["copy b"]


def test_a_place_taken_lost_and_taken_again_is_written_where_it_is_now():
    bank, diary, staging = make(bank_pages=3, pages=1)
    assert bank.acquire("a")
    bank.release("a")
    copy_beside(staging, "a")
    for name in "bc":
        assert bank.acquire(name)
    bank.release("c")
    assert bank.acquire("a")
    staging.bring({"a", "b"})
    assert diary.holds["q", bank.place("a")["q"].pages[0]] == "device a0"
    assert diary.holds["q", bank.place("b")["q"].pages[0]] == "device b0"


def test_what_is_admitted_but_not_in_the_next_call_is_copied_beside_it():
    bank, diary, staging = make()
    assert bank.acquire("a")
    assert bank.acquire("b")
    staging.bring({"a"})
    copy_beside(staging, "c")
    staging.settle("c")
    assert diary.take() == ["copy a", "write a", "copy b c", "write b c"]


def test_after_a_reset_nothing_is_on_its_way():
    bank, diary, staging = make()
    bank.acquire("a")
    copy_beside(staging, ["a", "b"])
    bank.reset()
    copy_beside(staging, [])
    staging.settle(["a", "b"])
    assert diary.take() == ["copy a b"]


def test_of_several_that_cannot_be_written_the_one_that_fails_alone_twice_is_given_up():
    bank, diary, staging = make()
    diary.broken.add("b")
    given_up = []
    for _ in range(1 + STRIKES):
        for name in "abc":
            bank.acquire(name)
        with pytest.raises(WriteError) as error:
            staging.bring(set("abc"))
        given_up.append(bank.blame(error.value.digests))
        bank.reset()
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
        with pytest.raises(WriteError) as error:
            copy_beside(staging, ["a", "b"])
        assert error.value.digests == failed
        assert isinstance(error.value.__cause__, OSError)
        given_up.append(bank.blame(error.value.digests))
        bank.reset()
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


class Watching(Observer):
    """Notes what it is told; what is in ``failing`` fails."""

    def __init__(self):
        self.lines, self.failing = [], set()

    def copying(self, digests):
        self.note("copying", digests)

    def writing(self, digests):
        self.note("writing", digests)

    def note(self, *line):
        self.lines.append(line)
        if line[0] in self.failing:
            raise OSError("a failure that is played")


def test_an_observer_is_told_before_the_device_is():
    watching = Watching()
    bank, diary, staging = make(observer=watching)
    assert bank.acquire("a")
    copy_beside(staging, "ab")
    assert watching.lines == [("copying", ["a", "b"])]
    staging.bring({"a"})
    assert watching.lines[1:] == [("writing", ["a"])]
    assert diary.take() == ["copy a b", "write a"]


@pytest.mark.parametrize(("failing", "done"), [("copying", []), ("writing", ["copy a"])])
def test_what_an_observer_raises_is_a_failure_of_the_device(failing, done):
    watching = Watching()
    watching.failing.add(failing)
    bank, diary, staging = make(observer=watching)
    assert bank.acquire("a")
    with pytest.raises(WriteError) as error:
        staging.bring({"a"})
    assert error.value.digests == ["a"]
    assert diary.take() == done
