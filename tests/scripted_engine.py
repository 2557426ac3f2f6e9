"""An engine whose steps happen when a test lets them."""

import threading

from preft_jax.errors import RequestError
from serve.engine.request import Output


class ScriptedEngine:
    """Gives each request one token a step; prompts that begin with a key of ``faults`` meet what it names.

    A fault is ``"refused"`` by ``add``, ``"broken"``: the step raises, or ``"failed"``: the sample ends with an error.
    """

    def __init__(self, faults=None, free=False):
        self.faults = faults or {}
        self.allowed = threading.Semaphore(10**6 if free else 0)
        self.warm = threading.Event()
        self.may_warm = threading.Event()
        self.may_warm.set()
        self.live = {}
        self.early = []
        self.cancelled = []
        self.threads = set()
        self.num_steps = self.num_added = 0
        self.in_step = False

    @property
    def has_work(self):
        return bool(self.live or self.early)

    @property
    def pause(self):
        return 0.0 if self.has_work else None

    def warm_up(self):
        self.may_warm.wait()
        self.warm.set()

    def add(self, request):
        self.threads.add(threading.get_ident())
        if self.faults.get(request.prompt.token_ids[0]) == "refused":
            raise RequestError("refused")
        self.num_added += 1
        self.live[self.num_added] = [request, 0]
        return self.num_added

    def cancel(self, request_id, error=None):
        if request_id in self.live:
            request, _ = self.live.pop(request_id)
            self.cancelled.append(request_id)
            ends = [
                Output(request_id=request_id, index=i, finish_reason="abort", error=error) for i in range(request.n)
            ]
            self.early += ends

    def step(self):
        self.threads.add(threading.get_ident())
        early, self.early = self.early, []
        if early:
            return early
        self.in_step = True
        self.allowed.acquire()
        self.in_step = False
        self.num_steps += 1
        outputs = []
        for request_id, entry in list(self.live.items()):
            request, done = entry
            fault = self.faults.get(request.prompt.token_ids[0])
            if fault == "broken":
                raise RuntimeError("the device is gone")
            entry[1] = done = done + 1
            last = "error" if fault == "failed" else "length" if done == request.max_tokens else None
            if last:
                del self.live[request_id]
            outputs += [
                Output(request_id=request_id, index=i, token_ids=[done], text=str(done), finish_reason=last)
                for i in range(request.n)
            ]
        return outputs
