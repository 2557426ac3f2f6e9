import asyncio
import threading

import pytest
from scripted_engine import ScriptedEngine

from preft_jax.errors import RequestError
from preft_jax.text.chat import EncodedPrompt
from serve.engine.async_engine import AsyncEngine, EngineStopped, Overloaded
from serve.engine.request import Request

pytestmark = pytest.mark.host


def request(first=1, **fields):
    return Request(prompt=EncodedPrompt([first], ()), **{"max_tokens": 3, **fields})


def serve(engine, test, **options):
    """Run ``test`` on a started engine and stop it; whatever it does must be over in half a minute."""

    async def main():
        server = AsyncEngine(engine, **options)
        await server.start()
        await until(lambda: server.ready)
        try:
            return await test(server)
        finally:
            engine.allowed.release(10**6)
            await server.stop(0)

    return asyncio.run(asyncio.wait_for(main(), 30))


async def collect(server, one):
    return [output async for output in server.generate(one)]


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


def test_outputs_come_from_a_thread_of_its_own():
    engine = ScriptedEngine(free=True)

    async def test(server):
        return await asyncio.gather(collect(server, request()), collect(server, request(n=2, max_tokens=2)))

    one, two = serve(engine, test)
    assert [output.text for output in one] == ["1", "2", "3"]
    assert sorted((output.index, output.text) for output in two) == [(0, "1"), (0, "2"), (1, "1"), (1, "2")]
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_requests_opened_together_keep_their_numbers():
    async def test(server):
        stream = await server.open([request(max_tokens=1), request(max_tokens=2)])
        found = [(number, output.text) async for number, output in stream]
        stream.close()
        return found, server.num_open, server.num_waiting

    assert serve(ScriptedEngine(free=True), test) == ([(0, "1"), (1, "1"), (1, "2")], 0, 0)


def test_one_that_is_refused_takes_those_beside_it_along():
    engine = ScriptedEngine(faults={7: "refused"})

    async def test(server):
        with pytest.raises(RequestError, match="refused"):
            await server.open([request(), request(7)])
        assert (server.num_open, server.num_waiting) == (0, 0)
        assert engine.cancelled
        assert not engine.live

    serve(engine, test)


def test_a_closed_iterator_cancels_before_the_next_step():
    engine = ScriptedEngine()

    async def test(server):
        engine.allowed.release()
        stream = server.generate(request(max_tokens=100))
        assert (await anext(stream)).text == "1"
        await stream.aclose()
        engine.allowed.release()  # The step that was under way.
        await until(lambda: engine.cancelled)
        assert engine.num_steps <= 2
        assert server.num_open == 0

    serve(engine, test)


def test_a_request_that_is_given_up_while_it_is_handed_over_is_cancelled():
    engine = ScriptedEngine()

    async def test(server):
        first = await server.open([request()])
        await until(lambda: engine.in_step)  # What is asked for from here on lies in the inbox.
        waits = asyncio.create_task(server.open([request()]))
        await asyncio.sleep(0.01)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        engine.allowed.release()
        await until(lambda: engine.cancelled)
        first.close()
        assert (server.num_open, server.num_waiting) == (0, 0)

    serve(engine, test)


def test_too_many_that_wait_are_refused_until_there_is_room():
    engine = ScriptedEngine()

    async def test(server):
        streams = [await server.open([request()])]
        waits = [asyncio.create_task(server.open([request()])) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=r"3 requests wait .* at most 3 may") as caught:
            await server.open([request()])
        assert caught.value.retry_after >= 1
        engine.allowed.release(2)
        streams += await asyncio.gather(*waits)
        for stream in streams:
            await anext(stream)
        assert server.num_waiting == 0
        later = asyncio.create_task(server.open([request()]))
        while not later.done():
            engine.allowed.release()
            await asyncio.sleep(0.001)
        streams.append(await later)
        for stream in streams:
            stream.close()

    serve(engine, test, max_waiting=3)


def test_a_step_that_raises_fails_what_is_open_and_what_comes(caplog):
    engine = ScriptedEngine(faults={9: "broken"})

    async def test(server):
        stream = await server.open([request(), request(9)])
        engine.allowed.release()
        with pytest.raises(EngineStopped, match="RuntimeError: the device is gone"):
            await anext(stream)
        stream.close()
        assert not server.alive
        assert not server.accepts
        with pytest.raises(EngineStopped, match="restart"):
            await server.open([request()])

    serve(engine, test)
    (told,) = [record for record in caplog.records if record.message == "the engine failed"]
    assert "the device is gone" in str(told.exc_info)


def test_nothing_is_taken_before_it_is_warm():
    engine = ScriptedEngine(free=True)
    engine.may_warm.clear()

    async def main():
        server = AsyncEngine(engine)
        await server.start()
        assert server.alive
        assert not server.accepts
        with pytest.raises(EngineStopped, match="starting"):
            await server.open([request()])
        engine.may_warm.set()
        await until(lambda: server.ready)
        assert len(await collect(server, request())) == 3
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_stopping_finishes_what_runs():
    engine = ScriptedEngine()

    async def test(server):
        running = asyncio.create_task(collect(server, request()))
        await until(lambda: engine.live)
        stopping = asyncio.create_task(server.stop(20))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="shutting down"):
            await server.open([request()])
        engine.allowed.release(10)
        await stopping
        return await running

    assert [output.finish_reason for output in serve(engine, test)] == [None, None, "length"]


def test_what_has_not_finished_at_the_limit_is_given_up_and_told_so():
    engine = ScriptedEngine()

    async def test(server):
        running = asyncio.create_task(collect(server, request(max_tokens=1000)))
        await until(lambda: engine.live)
        engine.allowed.release()
        await until(lambda: engine.num_steps)
        stopping = asyncio.create_task(server.stop(0))
        await asyncio.sleep(0.01)
        engine.allowed.release()
        outputs = await running
        await stopping
        return outputs

    last = serve(engine, test)[-1]
    assert (last.finish_reason, last.error) == ("abort", "the server is shutting down")


def test_a_large_body_is_taken_in_parts_between_which_others_go_on():
    engine = ScriptedEngine(free=True)
    steps = []
    add = engine.add

    def noted(one):
        steps.append(engine.num_steps)
        return add(one)

    engine.add = noted

    async def test(server):
        other = asyncio.create_task(collect(server, request(max_tokens=10**4)))
        await until(lambda: engine.num_steps > 0)
        stream = await server.open([request(n=128, max_tokens=2) for _ in range(16)])
        found = [(number, output.index, output.text) async for number, output in stream]
        stream.close()
        other.cancel()
        return found

    found = serve(engine, test)
    assert sorted(found) == sorted((i, j, text) for i in range(16) for j in range(128) for text in "12")
    assert len(set(steps[1:])) == 8, "two prompts of 128 samples at a time"


@pytest.mark.parametrize("end", ["refused", "closed"])
def test_a_large_body_that_ends_while_it_is_taken_leaves_nothing(end):
    engine = ScriptedEngine(faults={7: "refused"})
    requests = [request(n=128) for _ in range(9)] + [request(7 if end == "refused" else 1)]

    async def test(server):
        opening = asyncio.create_task(server.open(requests))
        await until(lambda: engine.in_step)
        assert engine.num_added < len(requests)
        if end == "closed":
            opening.cancel()
            await asyncio.wait([opening])
            engine.allowed.release(10**6)
        else:
            engine.allowed.release(10**6)
            with pytest.raises(RequestError, match="refused"):
                await opening
        await until(lambda: not engine.has_work)
        await asyncio.sleep(0.01)
        assert not engine.has_work
        assert (server.num_open, server.num_waiting, server._running) == (0, 0, {})

    serve(engine, test)


def test_a_full_queue_leaves_each_other_tenant_a_share():
    engine = ScriptedEngine()

    async def test(server):
        taken = []

        def ask(tenant, count=1):
            return server.open([request(tenant=tenant) for _ in range(count)])

        async def take(tenant, count):
            before = server.num_waiting
            taken.append(asyncio.create_task(ask(tenant, count)))
            await until(lambda: server.num_waiting == before + count)

        await take("a", 16)
        for tenant, count in (("a", 1), (None, 3), ("b", 3)):
            with pytest.raises(Overloaded):
                await ask(tenant, count)
        await take("b", 2)
        with pytest.raises(Overloaded):
            await ask("b")
        for i in range(7):
            await take(f"c{i}", 2)
        assert server.num_waiting == 32
        with pytest.raises(Overloaded):
            await ask("late")
        engine.allowed.release(10**6)
        await until(lambda: server.num_waiting == 0)
        assert not server._waiting
        await asyncio.gather(*taken)

    serve(engine, test, max_waiting=16)


def test_an_engine_that_waits_for_requests_is_woken_for_other_work():
    class Working(ScriptedEngine):
        work = 0

        @property
        def pause(self):
            return 0.0 if self.work or self.has_work else None

        def step(self):
            self.work -= 1
            return super().step()

    engine = Working(free=True)

    async def test(server):
        await asyncio.sleep(0.01)  # It waits.
        engine.work = 2
        server.wake()
        await until(lambda: not engine.work)
        return engine.num_steps

    assert serve(engine, test) == 2
