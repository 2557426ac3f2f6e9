"""The engine: continuous batching of requests, each with its own adapter or none, over one base model.

Prompts are prefilled with their adapters' edits and decoded by a program that knows no adapters. A step collects what
the device computed, plans and starts the next call, and only then turns tokens into text, while the device works.
"""

import contextlib
import dataclasses
import functools
import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many

import jax
import numpy as np

from preft_jax.adapters.adapter import Adapter
from preft_jax.adapters.pages import pack_adapter
from preft_jax.device.compiles import CompileCounter, expected_compiles
from preft_jax.device.memory import Budget
from preft_jax.errors import ConfigError, ModelError, RequestError, check_type
from preft_jax.loading import Model
from preft_jax.sampling.rows import Drawn
from serve.engine.admission import encoded
from serve.engine.background import Background, Work
from serve.engine.calls import Call
from serve.engine.completion import Completion, complete
from serve.engine.config import EngineConfig
from serve.engine.handover import Handover, prompt_kv_of
from serve.engine.lookahead import ahead, full_prefill
from serve.engine.observer import Observer
from serve.engine.outputs import Delta, Sample, keep_scores, read, taken_over, to_output
from serve.engine.pacing import Pacing, Share
from serve.engine.parts import Parts, make_parts
from serve.engine.plan import Step
from serve.engine.recovery import STRIKES, Recovery, format_error
from serve.engine.request import Output, Request
from serve.engine.runner import Runner
from serve.engine.sequence import Sequence, Status
from serve.engine.staging import WriteError
from serve.engine.stats import Stats
from serve.engine.under_way import UnderWay
from serve.engine.whole import Ledger, whole, whole_step
from serve.store.host import AdapterStore
from serve.store.host_copy import Known, pack, pin

_LOADING_SECONDS = 0.02
"""How long a step without other work waits for adapters that are being loaded."""


class Engine:
    """Serves requests on one model. Not thread-safe: one thread adds, steps and cancels.

    Args:
        model: from ``load_model``.
        config: sizes.
        store: of the adapters that requests name by a ``Registered``; None: requests bring their adapters.
        background: other device work (``Work``), in units that are calls in the engine's own queue. It has the device
            to itself while no request is there.
        background_share: part of the device's time that it gets while requests run, from 0 up to, not including, 1.
        background_pacing: says how much it gets while requests run, in place of a share: such as ``pacing.Promise``.
        observer: told what the engine does.
        goes_ahead: whether a call is started while the one before it is under way; without, results are the same.
        seed: of the seeds that requests without one get, in the order of their arrival.
        clock: seconds.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig = EngineConfig(),
        *,
        store: AdapterStore | None = None,
        background: Work | None = None,
        background_share: float = 0.0,
        background_pacing: Pacing | None = None,
        observer: Observer | None = None,
        goes_ahead: bool = True,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_type("model", model, Model, "what load_model returns", ModelError)
        check_type("config", config, EngineConfig, "an EngineConfig", ConfigError)
        if config.max_model_len > model.config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {config.max_model_len} is longer than the model's "
                f"{model.config.max_position_embeddings} positions"
            )
        if background_pacing is not None and background_share:
            raise ConfigError("background_share and background_pacing are both given; give one of them")
        self.model = model
        self.config = config = config.resolve(jax.default_backend())
        self.runner = Runner(model, config)
        self._observer = observer or Observer()
        seeds = np.random.default_rng(seed)
        self._make_parts = functools.partial(
            make_parts, self.runner, model, config, pack=self._pack, store=store, observer=self._observer,
            goes_ahead=goes_ahead, seeds=seeds,
        )  # fmt: skip
        self._take_parts(self._make_parts())
        self._ledger = Ledger()
        self._aborted: list[Output] = []
        pacing = background_pacing or Share(background_share)
        self._background = Background(background, pacing, clock, jax.block_until_ready, expected_compiles)
        self._under_way = UnderWay(self._background, clock)
        self._clock = clock
        self._stats = Stats()
        self._compiles = CompileCounter(own_thread=True)
        self._live: dict[int, list[Sequence]] = {}
        self._samples: dict[Sequence, Sample] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._early: list[Delta] = []
        self._goes_ahead = goes_ahead
        self._asleep = False
        self._recovery = Recovery()
        self._mixed_failures = 0
        self._next_id = 0

    def _take_parts(self, parts: Parts) -> None:
        self._parts = parts
        self.pages, self.adapters, self._staging, self.scheduler, self._starter, self._admission = parts

    # Requests

    @whole
    def warm_up(self) -> None:
        """Compile every program and time those that the engine chooses between; cached prefixes are lost.

        An engine that was never warmed up compiles each program when a request first needs it.

        Raises:
            RequestError: if requests are unfinished.
        """
        if self.runner.step_seconds:
            return
        self._check_idle()
        self._forget_device()
        self.runner.warm_up()

    @whole
    def sleep(self) -> None:
        """Free the KV cache and the bank, for others who use the device, until the next step that has work.

        Weights, compiled programs and adapters in host memory stay; cached prefixes are lost.

        Raises:
            RequestError: if requests are unfinished.
        """
        self._check_idle()
        if not self._asleep:
            self._forget_device()
            self.runner.release()
            self._asleep = True

    def _check_idle(self) -> None:
        if self.has_work:
            raise RequestError(f"{len(self._live)} requests are unfinished; cancel them, or step until they are done")

    @property
    def memory(self) -> Budget | None:
        """The budget of an accelerator's memory, of which other work leases its share; None on a CPU."""
        return self.runner.memory

    @property
    def has_work(self) -> bool:
        """Whether requests are unfinished or outputs are still to come."""
        return bool(self._live or self._early or self._aborted) or not (self._ledger.is_whole or self._ledger.inside)

    @property
    def pause(self) -> float | None:
        """Seconds after which ``step`` has something to do though no request came; None: nothing until one comes."""
        if self.has_work:
            return 0.0
        return self._under_way.pause

    @property
    def under_way(self) -> list[Step]:
        """The steps that the device works on, oldest first."""
        return self._under_way.steps

    @property
    def stats(self) -> Stats:
        """A copy of the counters."""
        return dataclasses.replace(self._stats, **self._parts.counters(), recompiles=self._compiles.count)

    @whole
    def load_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Fold adapters now and keep them on the host, so that requests need not wait for it."""
        for adapter in adapters:
            self._admission.check_adapter(adapter)
            self.adapters.keep(adapter)

    @whole
    def add(self, request: Request) -> int:
        """Take a request; its outputs come from ``step``.

        Raises:
            RequestError, AdapterError: if it can never be served; nothing else is affected.
        """
        request = encoded(self.model, request)
        request_id = self._next_id
        sequences = self._admission.sequences(request, request_id)
        is_here = request.adapter is None or self.adapters.claim(request_id, request.adapter)
        self._samples |= {sequence: self._admission.sample(request) for sequence in sequences}
        self._next_id += 1
        self._live[request_id] = sequences
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (self._clock() + request.deadline, request_id))
        if request.handover is not None:
            self._take_over(request.handover, sequences)
        elif is_here:
            self.scheduler.add(sequences[0])
        self._background.arrived(sequences)
        self._ledger.opened((request_id, index) for index in range(request.n))
        return request_id

    def _take_over(self, handover: Handover, sequences: Many[Sequence]) -> None:
        """Give samples the first tokens that another engine drew, and let them go on."""
        self._samples[sequences[0]].prompt_scores = handover.prompt_logprobs
        for sequence, first in zip(sequences, handover.first, strict=True):
            self._early.append(taken_over(sequence, first))
            if self._early[-1].finish is None:
                self.scheduler.add(sequence)

    def generate(self, requests: Many[Request]) -> list[Completion]:
        """Serve requests to their end; return the completion of each sample: request by request, then by index.

        Raises:
            RequestError, AdapterError: if one of them can never be served, or others are unfinished; none is then left.
        """
        self._check_idle()
        return complete(self, requests)

    def _take_loaded(self) -> None:
        """Queue the requests whose adapters came, and end those whose adapters cannot be loaded."""
        for request_id, error in self.adapters.poll():
            for sequence in self._live[request_id] if error is not None else ():
                if sequence.status is not Status.FINISHED:
                    self._end(Delta(sequence=sequence, finish="error", error=error))
            leader = self._live[request_id][0]
            if leader.status is not Status.FINISHED:  # It may have been cancelled a moment before.
                self.scheduler.add(leader)

    @whole
    def cancel(self, request_id: int, error: str | None = None) -> None:
        """Give a request up; its samples' last outputs say ``"abort"``. Unknown and finished ones are ignored."""
        for sequence in self._live.get(request_id, []):
            if sequence.status is not Status.FINISHED:
                self._end(Delta(sequence=sequence, finish="abort", error=error))

    def _pack(self, adapter: Adapter) -> Known:
        packed = pack_adapter(adapter, self.model.config, self.runner.adapter_dtype)
        return pin(pack(packed), self.model.placement)

    # Steps

    @whole_step
    def step(self) -> list[Output]:
        """Give the device its next calls, collect the results of the oldest, and return their outputs.

        What is raised here, a ``KeyboardInterrupt`` for one, ends the unfinished requests: the next step returns their
        last outputs, which say ``"abort"``, and the engine serves new ones.
        """
        if self._aborted:
            aborted, self._aborted = self._aborted, []
            return aborted
        if self._asleep and self.has_work:
            self.runner.reset()
            self._asleep = False
        with self._compiles:
            self._take_loaded()
            self._expire()
            if self._live and self._under_way.go_on(self.scheduler, self.runner.params):
                return self._outputs(self._collect())
            if self._goes_ahead and not self._recovery.apart and self._run_ahead():
                return self._outputs([])
            deltas = self._collect()
            # Behind units there is time: tokens go out first.
            if not self.under_way and not (deltas and self._under_way.covers):
                step = self._schedule()
                if step is None and not deltas:
                    self._run_idle()
            return self._outputs(deltas)

    def _schedule(self) -> Step | None:
        """Plan and start a step while none is under way."""
        # What hides the host's time behind several steps of a call is done by units.
        step = self.scheduler.schedule(single=self._under_way.covers)
        self._run(step)
        return step

    def _expire(self) -> None:
        now = self._clock() if self._deadlines else 0.0
        while self._deadlines and self._deadlines[0][0] <= now:
            self.cancel(heapq.heappop(self._deadlines)[1], "its deadline passed")

    def _run_ahead(self) -> bool:
        """Start calls behind the one under way, or behind units, so that the device need not wait for the host.

        Returns whether a step was started behind units alone: there is nothing else to do now.
        """
        covered = self._under_way.covers
        if self._live and not self.under_way and covered:
            return self._schedule() is not None
        if len(self.under_way) != 1 or covered:
            return False
        (under_way,) = self.under_way
        step = ahead(self.scheduler, under_way)
        full = full_prefill(self.scheduler) if under_way.chunks else None
        if step is None or full is None:
            self._run(step or full)
            return False
        # Its arguments go to the device before copies that begin behind the step's start, or they would be held up;
        # it is started when the oldest call is over: a GPU's queue holds the kernels of two calls, hardly of three.
        with self._recovering(full):
            self._observer.planned(full)
            prepared = self._starter.prepare(full)
            self._run(step, copies=False)
            if self.under_way:
                prepared.begin_copies()
                self._under_way.prepared = prepared
        return False

    def _run(self, step: Step | None, *, copies: bool = True) -> None:
        """Start a step on the device; ``copies``: see ``Starter.start``."""
        if step is not None:
            self._launch(step, lambda: self._starter.start(step, copies=copies))

    def _launch(self, step: Step, start: Callable[[], Call]) -> None:
        with self._recovering(step):
            self._observer.started(step, self.under_way)
            started = self._clock()
            call = start()
            call.started = started
            self._under_way.started(call)
            self._stats.started(step)
            self._staging.settle(self.scheduler.next_adapters(2))
        self._under_way.start_beside(self.scheduler, self.runner.params)

    @contextlib.contextmanager
    def _recovering(self, step: Step) -> Iterator[None]:
        """Catch failures of what is done for a step, and begin again without it."""
        try:
            yield
        except WriteError as error:
            self._recover_from_write(error)
        except Exception as error:
            self._recover([*self.under_way, step], error)

    # Other work

    def _run_idle(self) -> None:
        """Without requests: give the device to other work, or wait for adapters that are being loaded."""
        if self._live:
            if self.adapters.loading and not self._early:
                self.adapters.wait(_LOADING_SECONDS)
        elif not self._early:
            self._under_way.start_idle(self.runner.params)

    def _begin_anew(self) -> None:
        """After a call of the engine that was cut off: end all requests and make the host's and device's state anew."""
        aborted, parts = self._ledger.aborted(), self._make_parts()
        parts.inherit(self._parts)
        self._take_parts(parts)
        self._live, self._samples, self._deadlines, self._early = {}, {}, [], []
        self._recovery, self._mixed_failures = Recovery(), 0
        self._under_way.interrupted()
        self._compiles = self._compiles.successor()
        self.runner.reset()
        self._asleep = False
        self._aborted = aborted
        self._ledger.is_whole = True

    # Results

    def _collect(self) -> list[Delta]:
        """Wait for the oldest call and give each sequence what it drew."""
        deltas = self._take_early()
        calls = self._under_way.calls
        if not calls or self._under_way.end_oldest_unit():
            return deltas
        call = calls.popleft()
        assert isinstance(call, Call)
        try:
            self._observer.collecting(call.step)
            drawn, scores, prompt_kv = call.results()
            drawn = [self._observer.collected(part.sequences, d) for part, d in zip(call.parts, drawn, strict=True)]
        except Exception as error:
            self._recover([call.step], error)
            return deltas + self._take_early()
        prepared, self._under_way.prepared = self._under_way.prepared, None
        if prepared is not None:
            self._launch(prepared.step, prepared.start)
            if not self.under_way:  # It failed, and what was computed is lost.
                return deltas + self._take_early()
        self._recovery.trust(call.step, (s for group in self._live.values() for s in group))
        seconds = self._under_way.took(call.started)
        self._stats.over(call.step, seconds, drawn)
        if scores is not None:
            for chunk in call.step.chunks:
                if chunk.sequence.score and chunk.sequence.status is not Status.FINISHED:
                    keep_scores(self._samples[chunk.sequence], chunk, scores)
        for sequence, parts in prompt_kv.items():
            if sequence.status is not Status.FINISHED:
                self._samples[sequence].prompt_kv = prompt_kv_of(
                    sequence, parts, kv_digest=self.model.kv_digest, adapter_dtype=self.runner.stored_adapters
                )
        self.scheduler.computed(call.step)
        for part, d in zip(call.parts, drawn, strict=True):
            deltas += self._append(part.sequences, d)
        self._background.collected(call.step, seconds)
        return deltas

    def _append(self, sequences: Many[Sequence], drawn: Drawn) -> list[Delta]:
        """Give sequences the tokens that they drew; those that end free what they hold."""
        deltas = list(read(drawn, sequences))
        for new in deltas:
            self._stats.generated_tokens += len(new.token_ids)
            self.scheduler.append(new.sequence, new.token_ids)
            if new.finish is not None:
                # What is not a number must not be found again.
                self.scheduler.finish(new.sequence, keep=new.finish != "error")
        return deltas

    def _end(self, delta: Delta) -> None:
        """End a sample outside a call's results; its last output comes with the next step."""
        self.scheduler.finish(delta.sequence)
        self._early.append(delta)

    def _take_early(self) -> list[Delta]:
        early, self._early = self._early, []
        return early

    def _reset_device(self) -> None:
        """Make the device's state anew: a call that failed may have consumed it. Everything is computed again."""
        self._stats.device_failures += 1
        self._forget_device()
        self.runner.reset()

    def _forget_device(self) -> None:
        self._under_way.forget_steps()
        self.adapters.reset()
        self.scheduler.reset()

    def _recover(self, steps: Many[Step], error: Exception) -> None:
        """After a call that failed, one of these: begin again, and find out whom it fails for."""
        self._reset_device()
        self._mixed_failures += steps[-1].kind == "mixed"
        if self._mixed_failures == STRIKES:  # Calls of their own may do what they cannot do together.
            self.scheduler.stop_mixing()
        given_up = self._recovery.isolate(steps)
        if given_up is not None:
            self._end(Delta(sequence=given_up, finish="error", error=format_error(error)))

    def _recover_from_write(self, error: WriteError) -> None:
        """After adapters could not be written: try each alone, then give the requests of one that fails again up."""
        self._reset_device()
        digest = self.adapters.blame(error.digests)
        for sequence in [s for group in self._live.values() for s in group if digest and s.adapter == digest]:
            if sequence.status is not Status.FINISHED:
                self._end(Delta(sequence=sequence, finish="error", error=format_error(error.__cause__)))

    def _outputs(self, deltas: Many[Delta]) -> list[Output]:
        """Turn deltas into outputs; a sample whose text ends it takes nothing more from the call in flight."""
        outputs = []
        for new in (*deltas, *self._take_early()):
            if new.sequence not in self._live.get(new.sequence.request_id, ()):
                continue  # Its text ended it a moment before something else did.
            outputs.append(self._output(new))
            if new.finish is not None:
                self.scheduler.finish(new.sequence)
                self._forget(new.sequence)
                self._stats.finished += 1
                self._stats.failed += new.finish == "error"
        return outputs

    def _output(self, new: Delta) -> Output:
        """Turn a delta into an output; what cannot be turned into text ends its own sample only."""
        try:
            return to_output(new, self._samples[new.sequence])
        except Exception as error:
            new.finish, new.error = "error", f"its text could not be made: {type(error).__name__}: {error}"
            return Output(
                request_id=new.sequence.request_id, index=new.sequence.index, finish_reason="error", error=new.error
            )

    def _forget(self, sequence: Sequence) -> None:
        rest = [s for s in self._live[sequence.request_id] if s is not sequence]
        self._live[sequence.request_id] = rest
        del self._samples[sequence]
        if not rest:
            del self._live[sequence.request_id]
            if sequence.adapter is not None:
                self.adapters.give_back(sequence.request_id, sequence.adapter)
