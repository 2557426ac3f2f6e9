"""A clock that only tests move, and an engine whose every step takes a known time."""

import dataclasses

from preft_jax.errors import RequestError
from serve.engine.request import Output


class FakeClock:
    """Seconds that pass only while something sleeps."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@dataclasses.dataclass
class FakeStats:
    recompiles: int = 0
    steps: int = 0


class FakeEngine:
    """Runs up to ``max_num_seqs`` requests together; a step takes ``step_seconds`` and gives each one token.

    ``faults`` maps a prompt's first token to what becomes of the request: a finish reason, or ``"refused"``. Requests
    longer than ``max_model_len`` are refused too.
    """

    def __init__(self, clock, max_num_seqs=4, max_model_len=10_000, step_seconds=1.0, faults=None):
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.step_seconds = step_seconds
        self.faults = faults or {}
        self.stats = FakeStats()
        self.running = {}
        self.cancelled = []
        self.loaded = []
        self.most = 0
        self.warm = False
        self.requests = []

    @property
    def has_work(self):
        return bool(self.running)

    @property
    def pause(self):
        return 0.0 if self.has_work else None

    def warm_up(self):
        self.warm = True

    def load_adapters(self, adapters):
        self.loaded += adapters

    def add(self, request):
        ids = request.prompt.token_ids
        if len(ids) + request.max_tokens > self.max_model_len:
            raise RequestError(f"more than max_model_len {self.max_model_len}")
        if self.faults.get(ids[0]) == "refused":
            raise RequestError("refused")
        self.requests.append(request)
        self.running[len(self.requests)] = request.max_tokens
        self.most = max(self.most, len(self.running))
        return len(self.requests)

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        return self.running.pop(request_id, None) is not None

    def step(self):
        self.clock.sleep(self.step_seconds)
        self.stats.steps += 1
        outputs = []
        for request_id in list(self.running)[: self.max_num_seqs]:
            fault = self.faults.get(self.requests[request_id - 1].prompt.token_ids[0])
            if fault is not None:
                del self.running[request_id]
                outputs.append(Output(request_id=request_id, finish_reason=fault, error="broken"))
                continue
            self.running[request_id] -= 1
            done = self.running[request_id] == 0
            if done:
                del self.running[request_id]
            outputs.append(Output(request_id=request_id, token_ids=[7], finish_reason="length" if done else None))
        return outputs
