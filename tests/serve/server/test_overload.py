"""Far more requests than there is room for, through the program."""

import asyncio
import collections

import api_program
import api_server
import httpx

WAITING, REQUESTS = 6, 160
"""Two run and six may wait: all at once is twenty times that."""

PROMPTS = ("abc", "xyz", "a longer prompt")


def body(number, **fields):
    return {"model": "tiny", "prompt": PROMPTS[number % 3], "max_tokens": 30, "temperature": 0, "ignore_eos": True,
            **fields}  # fmt: skip


async def overload(url):
    """Send everything at once; returns the answers and the lengths of the queue that were seen meanwhile."""
    headers = {"Authorization": f"Bearer {api_server.ALICE}"}
    admin = {"Authorization": f"Bearer {api_server.ADMIN}"}
    limits = httpx.Limits(max_connections=None)
    options = {"base_url": url, "headers": headers, "timeout": 120, "trust_env": False, "limits": limits}
    async with httpx.AsyncClient(**options) as client:
        asked = [client.post("/v1/completions", json=body(number)) for number in range(REQUESTS)]
        answers, seen = asyncio.gather(*asked), []
        while not answers.done():
            text = (await client.get("/metrics", headers=admin)).text
            seen += [float(line.split()[1]) for line in text.splitlines() if line.startswith("vllm:num_requests_wait")]
        return await answers, seen


def test_the_queue_is_bounded_and_those_who_are_let_in_are_served():
    with api_program.Program("--max-waiting", str(WAITING)) as program:
        program.until_ready()
        with program.client(api_server.ALICE) as alice:
            alone = [alice.post("/v1/completions", json=body(number)).json() for number in range(3)]
            texts = [found["choices"][0]["text"] for found in alone]
            answers, seen = asyncio.run(overload(program.url))
            counts = collections.Counter(answer.status_code for answer in answers)
            assert counts.keys() == {200, 429}
            assert counts[200] >= WAITING
            assert counts[429] > REQUESTS / 2
            for number, answer in enumerate(answers):
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["text"] == texts[number % 3]
                    assert answer.json()["usage"]["completion_tokens"] == 30
                else:
                    assert answer.json()["error"]["code"] == "overloaded"
                    assert int(answer.headers["retry-after"]) >= 1
            assert 0 < max(seen) <= WAITING
            metrics = program.until_idle()
            assert metrics["preft_http_responses_total", "/v1/completions", "429"] == counts[429]
            assert metrics["vllm:request_success_total", "length"] == counts[200] + 3
            assert alice.post("/v1/completions", json=body(1)).json()["choices"][0]["text"] == texts[1]
