"""The contracts of training and serving: who is edited when, and that batching, cutting and recomputing change nothing.

All runs are float32 on a three-layer model whose logits are within about ±10. ``reference`` is the model in float64.
Each contract also has a twin that breaks it on purpose and must differ by far more than the tolerance.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from preft_jax.generator import RunShape, request_edit_mask
from preft_jax.programs import DecodeState, programs

import preft_jax
from preft_jax import AdapterConfig, AdapterError, Generator, Request, SamplingParams, random_adapter
from preft_jax.adapters.bank import BankAllocator, init_bank, write_adapter
from preft_jax.adapters.edit_mask import extend_edit_mask
from preft_jax.adapters.pages import pack_adapter
from preft_jax.config import RopeScaling
from preft_jax.loading import serving_params
from preft_jax.models.batch import Span, pack_prefill
from preft_jax.models.cache import init_cache
from preft_jax.models.forward import decode
from preft_jax.models.modules import abstract_params
from preft_jax.sampling.arrays import SamplingArrays, sampling_arrays
from preft_jax.sampling.logits import History
from preft_jax.shapes import SITES
from preft_jax.text.chat import EncodedPrompt, encode_prompt

PREFILL_ONLY = (
    "lora", "lora_r24", "lora_pattern", "direft", "direft_free", "loreft", "loreft_f3l2", "lora_skip",
)  # fmt: skip
ALL_TOKEN = ("lora_all", "loreft_all")
EVERY = (None, *PREFILL_ONLY, *ALL_TOKEN)

ATOL = 1e-4
"""Float32 rounding of log-probabilities through three layers and a head; measured at about 2e-5."""
VISIBLE = 100 * ATOL
"""What a broken contract must change at least."""

GREEDY = SamplingParams(temperature=0.0)
SHAPE = RunShape(num_tokens=64, max_query_len=64, tile_entries=16, rows=8, row_entries=4, stop_ids=4)
"""One prefill program and one decode program for nearly every test here."""


@pytest.fixture(scope="module")
def kinds(adapters):
    """Return adapters by name; None is the base model."""
    return {None: None, **adapters}


@pytest.fixture(scope="module")
def generator(lively, limits):
    """Return the generator of most tests. Every run writes all the KV that it reads, so tests do not depend on it."""
    return Generator(lively, limits)


class Device:
    """KV cache, bank and programs without the generator's host loop, so that a test can call them in any order.

    A request lives in a *row*: a run of KV pages of its own.
    """

    def __init__(self, model, limits):
        self.model, self.limits = model, limits
        self.params, self.programs = serving_params(model, 8), programs(model.config)
        self.width = limits.max_model_len // limits.page_size
        self.cache = init_cache(model.config, limits.max_num_seqs * self.width, limits.page_size, np.float32)
        self.bank = init_bank(model.config, limits.bank_pages, np.float32)
        self.allocator = BankAllocator(limits.bank_pages)
        self.places = {}

    def pages(self, row):
        return range(row * self.width, (row + 1) * self.width)

    def where(self, adapter):
        if adapter is None:
            return {}
        if adapter.digest not in self.places:
            packed = pack_adapter(adapter, self.model.config)
            self.places[adapter.digest] = self.allocator.allocate(packed)
            self.bank = write_adapter(self.bank, packed, self.places[adapter.digest])
        return self.places[adapter.digest]

    def spans(self, one, row, cuts=(), generated=(), mask=None):
        """Return a request's tokens as spans cut at ``cuts``, its mask made once as its contract says, or given."""
        tokens = np.asarray([*one.prompt.token_ids, *generated], np.int32)
        if mask is None:
            positions = "prompt" if one.adapter is None else one.adapter.config.positions
            mask = extend_edit_mask(request_edit_mask(one), len(generated), positions)
        edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]
        place = self.where(one.adapter)
        return [
            Span(tokens=tokens[start:end], start=start, edit_mask=mask[start:end], kv_pages=self.pages(row),
                 adapter_pages=place)
            for start, end in itertools.pairwise(edges)
        ]  # fmt: skip

    def prefill(self, spans):
        """Run one prefill call; returns the float64 log-softmax of each span's last token."""
        limits = self.limits
        batch = pack_prefill(
            spans, num_tokens=SHAPE.num_tokens, num_requests=limits.prefill_seqs, page_table_width=self.width,
            page_size=limits.page_size, tile=limits.tile, min_entries=SHAPE.tile_entries,
        )  # fmt: skip
        logits, self.cache = self.programs.prefill(
            self.params, self.bank, self.cache, batch, max_query_len=SHAPE.max_query_len
        )
        return reference.log_softmax(reference.f64(logits)[: len(spans)])

    def decode(self, row, token, position, count):
        """Decode ``count`` greedy tokens after ``token``, beside idle rows; returns them."""
        state = DecodeState(
            np.zeros(8, np.int32), np.zeros(8, np.int32), np.zeros(8, np.int32), np.zeros((8, self.width), np.int32),
            np.full((8, 4), -1, np.int32),
        )  # fmt: skip
        state.token_B[2], state.position_B[2], state.remaining_B[2] = token, position, count
        state.page_table_BP[2] = self.pages(row)
        tokens, state = [], jax.tree.map(jnp.asarray, state)
        while len(tokens) < count:
            self.cache, state, drawn = self.programs.decode(
                self.params, self.cache, state, sampling_arrays([GREEDY], [0], 8), num_steps=self.limits.decode_steps
            )
            tokens += [int(token) for token in drawn.token_NB[:, 2] if token >= 0]
        return tokens

    def kv(self, row, count):
        """Return keys and values of a row's first ``count`` tokens, float64 ``[2, L, count, K, C]``."""
        own = np.array(self.pages(row))
        rows = [np.asarray(pool)[own].reshape(-1, *pool.shape[2:])[:count] for pool in self.cache.kv]
        return np.array([[row[:, part::2] for row in rows] for part in (0, 1)], np.float64)


@pytest.fixture(scope="module")
def device(lively, limits):
    return Device(lively, limits)


def encoded(tokens, spans=()):
    return EncodedPrompt([int(token) for token in tokens], tuple(spans))


def request(tokens, adapter=None, *, sampling=GREEDY, max_tokens=6, seed=0, spans=()):
    return Request(prompt=encoded(tokens, spans), adapter=adapter, sampling=sampling, max_tokens=max_tokens, seed=seed)


def run(generator, requests, shape=SHAPE):
    done = dict(generator.run(requests, shape=shape))
    return [done[i] for i in range(len(requests))]


def reference_kv(model, adapter, tokens, mask):
    _, cache = reference.forward_with_kv(model.config, model.params, tokens, adapter, mask)
    return np.array([[k for k, _ in cache], [v for _, v in cache]])


def last_log_probs(model, adapter, tokens, mask):
    """Return the reference's log-softmax after the last token."""
    return reference.log_softmax(reference.forward(model.config, model.params, tokens, adapter, mask)[-1])


def assert_is_reference(model, one, ours):
    expected = reference.forced_log_probs(
        model, one.adapter, one.prompt.token_ids, ours.token_ids, one.prompt.unedited_spans
    )
    np.testing.assert_allclose(ours.logprobs, expected, atol=ATOL)


def agreement(model, one, ours, other):
    """Return at how many steps two greedy runs agree; they may part only where the reference itself nearly ties."""
    for step, (a, b) in enumerate(zip(ours.token_ids, other.token_ids, strict=True)):
        if a != b:
            tokens = [*one.prompt.token_ids, *ours.token_ids[:step]]
            mask = reference.adapter_mask(one.adapter, len(one.prompt.token_ids), step)
            top = np.sort(last_log_probs(model, one.adapter, tokens, mask))[-2:]
            assert top[1] - top[0] < ATOL, f"step {step}: {a} and {b}, which are {top[1] - top[0]} apart"
            return step
        assert ours.logprobs[step] == pytest.approx(other.logprobs[step], abs=ATOL)
    return len(ours.token_ids)


# One model: training's forward, prefill and the reference.

VARIANTS = {
    # Wavelengths of the heads lie on every side of the two bounds.
    "llama3": {
        "rope_scaling": RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        "rope_theta": 500.0,
        "head_dim": 24,
        "tie_word_embeddings": False,
    },
    "qwen2": {"qkv_bias": True, "num_key_value_heads": 1},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_is_the_reference(name, tiny, trained, rng):
    config = dataclasses.replace(tiny.config, num_hidden_layers=2, **VARIANTS[name])
    params = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) * leaf.shape[0] ** -0.5 + (leaf.ndim == 1)).astype(np.float32),
        abstract_params(config),
    )
    adapter = random_adapter(AdapterConfig(rank=4), config, jax.random.key(3), strength=1.0)
    tokens = rng.integers(0, 256, 14)
    mask = reference.edit_mask(9, generated=5)
    model = dataclasses.replace(tiny, config=config, params=params)
    expected = reference.log_softmax(reference.forward(config, params, tokens, adapter, mask))
    np.testing.assert_allclose(trained(model, adapter, tokens, mask), expected, atol=ATOL)


@pytest.mark.parametrize("name", EVERY)
def test_prefill_is_the_training_forward_and_the_reference(name, device, kinds, lively, trained, rng):
    """One mask, one fold, one model: log-softmax after the last token, and the KV of every token."""
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 21), adapter)
    tokens = np.asarray(one.prompt.token_ids)
    mask = request_edit_mask(one)
    np.testing.assert_array_equal(mask, reference.adapter_mask(adapter, 21))
    (ours,) = device.prefill(device.spans(one, 2))
    np.testing.assert_allclose(ours, last_log_probs(lively, adapter, tokens, mask), atol=ATOL)
    np.testing.assert_allclose(device.kv(2, 21), reference_kv(lively, adapter, tokens, mask), atol=ATOL)
    np.testing.assert_allclose(ours, trained(lively, adapter, tokens, mask)[-1], atol=ATOL)


# Contract 2: the last prompt token is edited, and the first token is drawn from its edited hidden state.


@pytest.mark.parametrize("name", [*PREFILL_ONLY, *ALL_TOKEN])
def test_last_prompt_token_is_edited(name, device, generator, kinds, rng):
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 15), adapter)
    without_last = request_edit_mask(one)
    without_last[-1] = False
    ours, broken, base = device.prefill(
        device.spans(one, 0) + device.spans(one, 1, mask=without_last) + device.spans(request(one.prompt.token_ids), 2)
    )
    assert np.abs(ours - broken).max() > VISIBLE
    assert np.abs(ours - base).max() > VISIBLE
    (first,) = run(generator, [one])
    assert first.token_ids[0] == ours.argmax()
    assert first.logprobs[0] == pytest.approx(ours.max(), abs=ATOL)


def test_a_prompt_of_one_token_is_edited(device, generator, kinds, lively):
    one = request([65], kinds["lora"])
    ours, base = device.prefill(device.spans(one, 0) + device.spans(request([65]), 1))
    np.testing.assert_allclose(ours, last_log_probs(lively, one.adapter, [65], np.array([[True, False]])), atol=ATOL)
    assert np.abs(ours - base).max() > VISIBLE
    assert run(generator, [one])[0].token_ids[0] == ours.argmax()


# Contract 3: generated tokens are never edited, also when they are computed again.


@pytest.mark.parametrize("name", EVERY)
def test_a_run_is_the_reference_with_its_mask(name, generator, kinds, lively, rng):
    """Prompt edited, generated tokens not, except by all-token adapters: the log-probability of every step."""
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 15), adapter, sampling=SamplingParams(temperature=1.0), seed=5, max_tokens=9)
    (ours,) = run(generator, [one])
    assert_is_reference(lively, one, ours)
    if adapter is None:
        return
    other_mask = reference.adapter_mask(adapter, 15, 9)
    other_mask[15:, 0] = adapter.config.prefill_only
    tokens = [*one.prompt.token_ids, *ours.token_ids]
    broken = reference.log_softmax(reference.forward(lively.config, lively.params, tokens, adapter, other_mask))
    broken = [broken[14 + i, token] for i, token in enumerate(ours.token_ids)]
    assert np.abs(np.subtract(ours.logprobs, broken))[1:].max() > VISIBLE


@pytest.mark.parametrize("name", ["lora", "lora_pattern", "loreft", "loreft_f3l2", "lora_all"])
def test_recomputing_generated_tokens_gives_the_run_again(name, device, generator, kinds, rng):
    """As after preemption: prompt and generated tokens in one call, at every length that the run went through."""
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 5), adapter, max_tokens=7)
    (ours,) = run(generator, [one])
    rows = range(7)
    again = device.prefill([device.spans(one, row, generated=ours.token_ids[:row])[0] for row in rows])
    assert [int(row.argmax()) for row in again] == ours.token_ids
    np.testing.assert_allclose(again.max(axis=1), ours.logprobs, atol=ATOL)
    wrong = reference.adapter_mask(adapter, 5, 6)
    wrong[5:, 0] = adapter.config.prefill_only
    (broken,) = device.prefill(device.spans(one, 7, generated=ours.token_ids[:6], mask=wrong))
    assert np.abs(broken - again[6]).max() > VISIBLE


def test_recomputed_tokens_are_drawn_as_the_first_time(device, generator, kinds, rng):
    """A draw's key is the request's seed and the token's position, also of the first token, whatever computed it."""
    sampling = SamplingParams(temperature=1.2)
    one = request(rng.integers(0, 256, 5), kinds["lora"], sampling=sampling, seed=9, max_tokens=7)
    (ours,) = run(generator, [one])
    again = device.prefill([device.spans(one, row, generated=ours.token_ids[:row])[0] for row in range(7)])
    logits, positions = np.zeros((8, 256), np.float32), np.zeros(8, np.int32)
    logits[:7], positions[:7] = again, 5 + np.arange(7)
    drawn = device.programs.sample(logits, positions, sampling_arrays([sampling] * 7, [9] * 7, 8))
    assert drawn.token_B[:7].tolist() == ours.token_ids
    elsewhere = device.programs.sample(logits, positions + 1, sampling_arrays([sampling] * 7, [9] * 7, 8))
    assert elsewhere.token_B[0] != ours.token_ids[0]


@pytest.mark.parametrize("name", [None, "loreft"])
def test_a_preempted_request_continues_as_if_never_stopped(name, device, generator, kinds, rng):
    """Stopped after five tokens and recomputed in two chunks, one of prompt and generated tokens; then decoded on."""
    one = request(rng.integers(0, 256, 12), kinds[name], max_tokens=10)
    (whole,) = run(generator, [one])
    for span in device.spans(one, 3, [8], generated=whole.token_ids[:5]):
        (log_probs,) = device.prefill([span])
    token = int(log_probs.argmax())
    assert [token, *device.decode(3, token, 17, 4)] == whole.token_ids[5:]


# Contract 4: decoding has no adapter.


class Poison:
    """A clock that replaces the bank when the last request of a batch has its first token: prefill is then over."""

    def __init__(self, after, value):
        self.after, self.value = after, value
        self.generator = None

    def __call__(self):
        self.after -= 1
        if self.after == 0:
            rng = np.random.default_rng(3)

            def poisoned(leaf):
                bad = rng.standard_normal(leaf.shape) if self.value is None else np.full(leaf.shape, self.value)
                return jnp.asarray(bad, leaf.dtype)

            self.generator.bank = jax.tree.map(poisoned, self.generator.bank)
        return 0.0


def run_poisoned(model, limits, requests, value):
    clock = Poison(len(requests), value)
    generator = clock.generator = Generator(model, limits, clock=clock)
    done = run(generator, requests)
    assert clock.after <= 0
    return done


@pytest.mark.parametrize("value", [np.nan, None], ids=["nan", "random"])
def test_a_bank_destroyed_after_prefill_changes_nothing(value, generator, kinds, limits, lively, rng):
    requests = [request(rng.integers(0, 256, 5 + i), kinds[name]) for i, name in enumerate((None, *PREFILL_ONLY[:7]))]
    clean = run(generator, requests)
    poisoned = run_poisoned(lively, limits, requests, value)
    assert [c.token_ids for c in poisoned] == [c.token_ids for c in clean]
    assert [c.logprobs for c in poisoned] == [c.logprobs for c in clean]


def test_a_bank_destroyed_after_prefill_breaks_all_token_adapters(generator, kinds, limits, lively, rng):
    """The twin of the test above: the poison does reach a decode that reads the bank."""
    one = request(rng.integers(0, 256, 9), kinds["lora_all"])
    (clean,), (poisoned,) = run(generator, [one]), run_poisoned(lively, limits, [one], None)
    assert clean.logprobs[0] == poisoned.logprobs[0]
    assert np.abs(np.subtract(clean.logprobs, poisoned.logprobs))[1:].max() > VISIBLE


class Recorder:
    """Stands in for a jitted program and keeps the arguments of its calls as shapes."""

    def __init__(self, program):
        self.program = program
        self.calls = []

    def __call__(self, *args, **kwargs):
        def shape_of(leaf):
            return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)

        self.calls.append((jax.tree.map(shape_of, args), kwargs))
        return self.program(*args, **kwargs)

    def signatures(self):
        return {(str(args), str(kwargs)) for args, kwargs in self.calls}

    def fingerprints(self):
        texts = [self.program.lower(*args, **kwargs).as_text() for args, kwargs in self.calls]
        return {hashlib.sha256(text.encode()).hexdigest() for text in texts}


@pytest.fixture
def recorded(generator):
    """Return the generator with every program recorded, for one test."""
    plain = generator.programs
    generator.programs = type(plain)(*map(Recorder, plain))
    yield generator
    generator.programs = plain


def test_decode_is_one_program_at_1_and_at_512_adapters(lively, limits, rng):
    """Eight rows decoded with one adapter resident in a small bank, and with 512 in a large one: one lowered text."""
    config = AdapterConfig(kind="direft", rank=2)
    many = [random_adapter(config, lively.config, jax.random.key(i)) for i in range(512)]
    prompts = rng.integers(0, 256, (8, 7))
    recorders = []
    for count, bank_pages in ((1, 2), (512, 513)):
        generator = Generator(lively, dataclasses.replace(limits, bank_pages=bank_pages))
        generator.load_adapters(many[:count])
        recorders.append(Recorder(generator.programs.decode))
        generator.programs = generator.programs._replace(decode=recorders[-1])
        run(generator, [request(p, many[(i * 70) % count], max_tokens=3) for i, p in enumerate(prompts)])
        assert {leaf.shape[1] for leaf in jax.tree.leaves(generator.bank)} == {bank_pages}
    one, other = (recorder.fingerprints() for recorder in recorders)
    assert one == other
    assert len(one) == 1


def test_decode_takes_the_model_the_cache_and_the_rows_and_nothing_else(recorded, kinds, rng):
    assert list(inspect.signature(decode).parameters) == ["config", "params", "cache", "batch"]
    run(recorded, [request(rng.integers(0, 256, 9), kinds["lora"])])
    (params, cache, state, sampling, history), kwargs = recorded.programs.decode.calls[0]
    assert set(kwargs) == {"num_steps"}
    for given_tree, held in ((params, recorded.params), (cache, recorded.cache)):
        assert jax.tree.structure(given_tree) == jax.tree.structure(held)
        assert [leaf.shape for leaf in jax.tree.leaves(given_tree)] == [leaf.shape for leaf in jax.tree.leaves(held)]
    assert isinstance(state, DecodeState)
    assert isinstance(sampling, SamplingArrays)
    assert isinstance(history, History)
    assert all(leaf.shape[0] == len(state.token_B) for leaf in jax.tree.leaves((state, sampling, history)))


def test_the_decode_of_all_token_adapters_does_depend_on_the_bank(generator, lively):
    """The twin of the fingerprint: two sizes of bank are two texts."""
    texts = set()
    for bank_pages in (2, 3):
        bank = jax.eval_shape(functools.partial(init_bank, lively.config, bank_pages, np.float32))
        state = DecodeState(*(np.zeros(shape, np.int32) for shape in ((1,), (1,), (1,), (1, 12), (1, 4))))
        lowered = generator.programs.decode_adapted.lower(
            generator.params,
            bank,
            {site: np.zeros((1, 1), np.int32) for site in SITES},
            generator.cache,
            state,
            sampling_arrays([GREEDY], [0], 1),
            num_steps=1,
        )
        texts.add(lowered.as_text())
    assert len(texts) == 2


def test_a_batch_without_all_token_adapters_uses_the_plain_decode(recorded, kinds, rng):
    run(recorded, [request(rng.integers(0, 256, 9), kinds[name]) for name in EVERY[:8]])
    assert recorded.programs.decode.calls
    assert not recorded.programs.decode_adapted.calls
    run(recorded, [request(rng.integers(0, 256, 9), kinds["lora_all"])])
    assert recorded.programs.decode_adapted.calls


def test_other_adapters_never_make_another_program(recorded, kinds, rng):
    """Kinds, ranks, target sets and lengths are data: one prefill and one decode program serve them all."""
    for names in (EVERY[:8], (None,) * 8, ("lora_pattern",) * 8):
        run(recorded, [request(rng.integers(0, 256, int(rng.integers(1, 30))), kinds[name]) for name in names])
    assert len(recorded.programs.prefill.signatures()) == 1
    assert len(recorded.programs.decode.signatures()) == 1
    assert len(recorded.programs.prefill.calls) > 3


def test_cache_and_bank_are_updated_in_place(device, kinds, lively, rng):
    """Donated buffers keep their addresses through prefill, decode and a page write."""

    def addresses(tree):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]

    one = request(rng.integers(0, 256, 9), kinds["lora"])
    spans = device.spans(one, 0)
    before = addresses(device.cache)
    device.prefill(spans)
    assert addresses(device.cache) == before
    device.decode(0, 5, 9, 4)
    assert addresses(device.cache) == before
    bank = init_bank(lively.config, 4, np.float32)
    packed = pack_adapter(kinds["loreft"], lively.config)
    before = addresses(bank)
    assert addresses(write_adapter(bank, packed, BankAllocator(4).allocate(packed))) == before


# Contract 7: a mixed batch is each request alone.

MIXED = (None, "lora", "direft", "loreft", "loreft_f3l2", "lora_r24", "lora_all", "lora_pattern")
LENGTHS = (7, 16, 1, 13, 40, 9, 5, 11)


def mixed_requests(kinds, rng, *, sampling=GREEDY, max_tokens=6):
    return [
        request(rng.integers(0, 256, count), kinds[name], sampling=sampling, seed=30 + i, max_tokens=max_tokens)
        for i, (name, count) in enumerate(zip(MIXED, LENGTHS, strict=True))
    ]


def test_mixed_batch_is_each_request_alone_in_any_order(generator, kinds, lively, rng):
    """102 prompt tokens at 64 a call are also cut, at another place in each order. Alone, other programs run."""
    requests = mixed_requests(kinds, rng)
    alone = [run(generator, [one], shape=SHAPE if i else None)[0] for i, one in enumerate(requests)]
    agreed = []
    for order in (range(8), rng.permutation(8), rng.permutation(8)):
        together = run(generator, [requests[i] for i in order])
        agreed += [agreement(lively, requests[i], ours, alone[i]) for i, ours in zip(order, together, strict=True)]
    # Ties as near as the tolerance are rare: they may cost a tenth of the steps.
    assert sum(agreed) >= 0.9 * 3 * 8 * 6


def test_mixed_batch_serves_every_request_its_own_adapter(generator, kinds, lively, rng):
    """One prompt for all: eight adapters give eight answers, each the reference's."""
    requests = [request(rng.integers(0, 256, 8), kinds[MIXED[0]])]
    requests += [request(requests[0].prompt.token_ids, kinds[name]) for name in MIXED[1:]]
    together = run(generator, requests)
    for one, ours in zip(requests, together, strict=True):
        assert_is_reference(lively, one, ours)
    answers = np.array([ours.logprobs for ours in together])
    apart = np.abs(answers[:, None] - answers).max(axis=2)
    assert (apart + np.eye(8) > VISIBLE).all()


def test_same_batch_twice_is_bitwise_the_same(generator, kinds, rng):
    requests = mixed_requests(kinds, rng)
    first, again = run(generator, requests), run(generator, requests)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert [c.logprobs for c in first] == [c.logprobs for c in again]


def test_one_adapter_among_base_requests(generator, kinds, lively, rng):
    requests = [request(rng.integers(0, 256, 6 + i), kinds["loreft"] if i == 3 else None) for i in range(8)]
    for one, ours in zip(requests, run(generator, requests), strict=True):
        assert_is_reference(lively, one, ours)


def test_an_adapter_just_evicted_leaves_nothing_to_base_requests(kinds, lively, limits, rng):
    """Base requests after adapter requests on the same pages of the bank and of the cache."""
    generator = Generator(lively, dataclasses.replace(limits, bank_pages=4))
    for names in (("lora", "loreft_f3l2"), (None, None), ("direft", None)):
        requests = [request(rng.integers(0, 256, 6), kinds[name]) for name in names for _ in range(4)]
        for one, ours in zip(requests, run(generator, requests), strict=True):
            assert_is_reference(lively, one, ours)


def test_an_adapter_that_is_still_wanted_is_not_evicted(kinds, lively, limits, rng):
    """The bank holds three pages: the second batch keeps its first adapter and needs the pages of the other one."""
    generator = Generator(lively, dataclasses.replace(limits, bank_pages=4))
    other = random_adapter(kinds["lora_r24"].config, lively.config, jax.random.key(77), strength=0.7)
    for pair in ((kinds["lora"], kinds["lora_r24"]), (kinds["lora"], other), (kinds["lora_r24"], kinds["lora"])):
        requests = [request(rng.integers(0, 256, 6), adapter) for adapter in pair for _ in range(4)]
        for one, ours in zip(requests, run(generator, requests), strict=True):
            assert_is_reference(lively, one, ours)


def test_more_requests_than_a_batch_holds(generator, kinds, lively, rng):
    requests = [*mixed_requests(kinds, rng, max_tokens=3), request(rng.integers(0, 256, 7), kinds["direft"])]
    done = list(generator.run(requests, shape=SHAPE))
    assert [index for index, _ in done] == list(range(9))
    for index, ours in done:
        assert_is_reference(lively, requests[index], ours)


def test_a_bank_too_small_for_all_batches_at_once_is_reused(kinds, lively, limits, rng):
    """Adapters of later batches take the pages of earlier ones, and come back later."""
    tight = Generator(lively, dataclasses.replace(limits, max_num_seqs=1, bank_pages=3))
    names = ("lora", "loreft_f3l2", "lora_r24", "direft", "lora")
    requests = [request(rng.integers(0, 256, 6), kinds[name], max_tokens=2) for name in names]
    for one, ours in zip(requests, run(tight, requests), strict=True):
        assert_is_reference(lively, one, ours)


def test_draws_do_not_depend_on_neighbours_or_places(generator, kinds, rng):
    """Sampled at temperature 1: the same tokens alone, in a batch, and in the batch reversed; other seeds differ."""
    requests = mixed_requests(kinds, rng, sampling=SamplingParams(temperature=1.0))
    together = run(generator, requests)
    backwards = run(generator, requests[::-1])[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in backwards]
    for i in (0, 5):
        assert run(generator, [requests[i]])[0].token_ids == together[i].token_ids
    repeated = [request(requests[0].prompt.token_ids, sampling=requests[0].sampling, seed=seed) for seed in range(8)]
    assert len({tuple(c.token_ids) for c in run(generator, repeated)}) > 4


@pytest.mark.parametrize("positions", ["prompt", "all"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_refused_and_spoils_nothing(positions, value, kinds, lively, limits, rng):
    """It never reaches the bank, where it would share tiles with others; those after it are served as ever."""
    bad = random_adapter(AdapterConfig(rank=8, positions=positions), lively.config, jax.random.key(9))
    bad.params["layers"][1]["down"]["lora_b"][3, 2] = value
    generator = Generator(lively, limits)
    with pytest.raises(AdapterError, match=r"'down'.*NaN or infinite"):
        run(generator, [request(rng.integers(0, 256, 7), adapter) for adapter in (kinds["lora"], bad, None)])
    for one in (request(rng.integers(0, 256, 7), adapter) for adapter in (kinds["lora"], None, kinds["lora_all"])):
        assert_is_reference(lively, one, run(generator, [one])[0])


@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_an_adapter_that_overflows_spoils_its_own_requests_only(positions, kinds, lively, limits, rng):
    """Not those that share its tiles and its batch, nor those that come after it on its pages of bank and cache."""
    bad = random_adapter(AdapterConfig(rank=8, positions=positions), lively.config, jax.random.key(9))
    for site in ("q", "v", "down"):
        bad.params["layers"][1][site]["lora_b"][:] = 1e38
    generator = Generator(lively, limits)
    for adapters in ((kinds["lora"], bad, None, kinds["loreft"], bad, None, None, kinds["lora_all"]), (None,) * 8):
        requests = [request(rng.integers(0, 256, 7), adapter) for adapter in adapters]
        for one, ours in zip(requests, run(generator, requests), strict=True):
            if one.adapter is bad:
                assert (ours.finish_reason, ours.token_ids) == ("error", [])
            else:
                assert_is_reference(lively, one, ours)


# Contract 7: chunked is whole.

CHUNKED = ("loreft_f3l2", "lora_r24", None, "direft")
CHUNKED_LENGTHS = (23, 9, 12, 1)
cuts_of = st.lists(st.integers(1, 22), max_size=5)


def in_chunks(device, requests, cuts, generated):
    """Prefill requests together, each cut in its own places; returns the last log-softmax and the KV of each."""
    queues = [device.spans(one, row, cuts[row], generated[row]) for row, one in enumerate(requests)]
    last = [None] * len(requests)
    while any(queues):
        rows = [row for row, queue in enumerate(queues) if queue]
        for row, log_probs in zip(rows, device.prefill([queues[row].pop(0) for row in rows]), strict=True):
            last[row] = log_probs
    lengths = [len(one.prompt.token_ids) + len(more) for one, more in zip(requests, generated, strict=True)]
    return last, [device.kv(row, count) for row, count in enumerate(lengths)]


@settings(max_examples=25)
@given(cuts=st.tuples(cuts_of, cuts_of, cuts_of, cuts_of), seed=st.integers(0, 999))
def test_chunked_is_whole_wherever_it_is_cut(device, kinds, cuts, seed):
    """Prompts and generated tokens, cut anywhere: chunks of one token, chunks that mix prompt and generated tokens."""
    rng = np.random.default_rng(seed)
    requests = [
        request(rng.integers(0, 256, count), kinds[name]) for name, count in zip(CHUNKED, CHUNKED_LENGTHS, strict=True)
    ]
    generated = [rng.integers(0, 256, count) for count in (0, 4, 0, 3)]
    whole, whole_kv = in_chunks(device, requests, [()] * 4, generated)
    parts, parts_kv = in_chunks(device, requests, cuts, generated)
    for row in range(4):
        np.testing.assert_allclose(parts[row], whole[row], atol=ATOL)
        np.testing.assert_allclose(parts_kv[row], whole_kv[row], atol=ATOL)


@pytest.mark.parametrize("cuts", [range(1, 23), [22], [1], [21, 22]], ids=["every token", "last", "first", "last two"])
def test_chunks_of_one_token(cuts, device, kinds, lively, rng):
    one = request(rng.integers(0, 256, 23), kinds["loreft_f3l2"])
    for span in device.spans(one, 1, cuts):
        (ours,) = device.prefill([span])
    mask = reference.adapter_mask(one.adapter, 23)
    np.testing.assert_allclose(ours, last_log_probs(lively, one.adapter, one.prompt.token_ids, mask), atol=ATOL)


def test_a_chunk_masked_by_its_own_length_would_differ(device, kinds, rng):
    """The twin: the same cut, but each chunk's mask made as if it were a prompt."""
    one = request(rng.integers(0, 256, 23), kinds["loreft_f3l2"])
    for span in device.spans(one, 1, [11]):
        (ours,) = device.prefill([span])
    for span in device.spans(one, 1, [11]):
        anew = reference.adapter_mask(one.adapter, len(span.tokens))
        (broken,) = device.prefill([dataclasses.replace(span, edit_mask=anew)])
    assert np.abs(ours - broken).max() > VISIBLE


@pytest.mark.parametrize("prefill_tokens", [8, 24])
def test_limits_that_cut_prompts_change_nothing(prefill_tokens, kinds, lively, limits, rng):
    """33 tokens at eight a call are four full calls and one of a single token, shared with the next request."""
    names, lengths = ("lora", "loreft_f3l2", None), (33, 17, 2)
    requests = [request(rng.integers(0, 256, count), kinds[name]) for name, count in zip(names, lengths, strict=True)]
    small = dataclasses.replace(limits, prefill_tokens=prefill_tokens, prefill_seqs=2, tile=8)
    for one, ours in zip(requests, run(Generator(lively, small), requests, shape=None), strict=True):
        assert_is_reference(lively, one, ours)


# Contract 6: many turns.

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Yo!"},
    {"role": "user", "content": "Sum?"},
]


def turned(adapter, turns):
    return preft_jax.Adapter(dataclasses.replace(adapter.config, assistant_turns=turns), adapter.params)


def test_an_answers_span_is_its_text_and_its_end_of_turn(lively):
    prompt = encode_prompt(lively.tokenizer, [{"role": "system", "content": "Be brief."}, *CHAT], vocab_size=256)
    ((start, end),) = prompt.unedited_spans
    assert lively.tokenizer.decode(prompt.token_ids[:start]).endswith("<|im_start|>assistant\n")
    assert lively.tokenizer.decode(prompt.token_ids[start:end]) == "Yo!<|im_end|>"
    assert lively.tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["lora", "loreft", "loreft_f3l2"])
@pytest.mark.parametrize("turns", ["edit", "skip"])
def test_a_chat_is_edited_by_its_adapters_turn_rule(turns, name, generator, kinds, lively):
    """``skip`` leaves the earlier answer as it was generated, ``edit`` edits the whole prompt."""
    adapter = turned(kinds[name], turns)
    prompt = encode_prompt(lively.tokenizer, CHAT, vocab_size=256)
    ((start, end),) = prompt.unedited_spans
    one = Request(prompt=prompt, adapter=adapter, sampling=GREEDY, max_tokens=4)
    (ours,) = run(generator, [one])
    assert_is_reference(lively, one, ours)
    if name != "loreft_f3l2":
        edited = request_edit_mask(one)[:, 0]
        assert edited[start:end].tolist() == [turns == "edit"] * (end - start)
        assert edited[:start].all()
        assert edited[end:].all()
        other = turned(adapter, "edit" if turns == "skip" else "skip")
        broken = reference.forced_log_probs(lively, other, prompt.token_ids, ours.token_ids, prompt.unedited_spans)
        assert np.abs(broken - ours.logprobs).max() > VISIBLE


@pytest.mark.parametrize("turns", ["skip", "edit"])
def test_generated_kv_is_the_next_turns_for_skip_adapters_only(turns, device, kinds, lively, rng):
    """Turn one generates. Turn two adds a user's text, and starts from turn one's KV instead of computing it again."""
    adapter = turned(kinds["lora"], turns)
    first = request(rng.integers(0, 256, 11), adapter)
    (log_probs,) = device.prefill(device.spans(first, 0))
    answer = [int(log_probs.argmax())]
    answer += device.decode(0, answer[0], 11, 5)
    kept = 11 + len(answer) - 1  # the last token's KV is not there: it was never fed back
    generated_kv = device.kv(0, kept)
    tokens = [*first.prompt.token_ids, *answer, *rng.integers(0, 256, 7)]
    second = request(tokens, adapter, spans=[(11, 11 + len(answer))])
    _, rest = device.spans(second, 0, [kept])
    (warm,) = device.prefill([rest])
    (cold,) = device.prefill(device.spans(second, 1))
    mask = reference.adapter_mask(adapter, len(tokens), 0, second.prompt.unedited_spans)
    np.testing.assert_allclose(cold, last_log_probs(lively, adapter, tokens, mask), atol=ATOL)
    if turns == "skip":
        np.testing.assert_allclose(generated_kv, device.kv(1, kept), atol=ATOL)
        np.testing.assert_allclose(warm, cold, atol=ATOL)
    else:
        assert np.abs(generated_kv - device.kv(1, kept)).max() > VISIBLE
        assert np.abs(warm - cold).max() > VISIBLE


@pytest.mark.parametrize("turns", ["skip", "edit"])
def test_a_raw_completion_is_one_edited_span(turns, kinds, lively):
    """Also where its text looks like a chat."""
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nYo!<|im_end|>\n"
    prompt = encode_prompt(lively.tokenizer, text, vocab_size=256)
    mask = request_edit_mask(Request(prompt=prompt, adapter=turned(kinds["lora"], turns)))
    assert mask[:, 0].all()
    assert not mask[:, 1].any()


def test_all_token_adapters_edit_earlier_answers_whatever_their_turn_rule(kinds, lively):
    """They edited them when they generated them."""
    prompt = encode_prompt(lively.tokenizer, CHAT, vocab_size=256)
    assert request_edit_mask(Request(prompt=prompt, adapter=turned(kinds["lora_all"], "skip")))[:, 0].all()


@pytest.mark.slow
def test_a_real_model_serves_a_mixed_batch_as_it_was_trained(smollm2, trained):
    """SmolLM2-135M in float32: thirty layers, real text, four requests at once; training's log-probabilities."""
    texts = ["The capital of France is", "def add(a, b):", "Once upon a time", "2 + 2 ="]
    configs = (
        None,
        AdapterConfig(rank=16),
        AdapterConfig(kind="loreft", rank=8),
        AdapterConfig(rank=8, positions="all"),
    )
    made = [
        None if config is None else random_adapter(config, smollm2.config, jax.random.key(i), strength=0.5)
        for i, config in enumerate(configs)
    ]
    done = preft_jax.generate(smollm2, texts, made, GREEDY, max_tokens=8)
    for text, adapter, ours in zip(texts, made, done, strict=True):
        prompt = smollm2.tokenizer.encode(text)
        tokens = [*prompt, *ours.token_ids]
        mask = reference.adapter_mask(adapter, len(prompt), len(ours.token_ids))
        log_probs = trained(smollm2, adapter, tokens, mask)[len(prompt) - 1 : -1]
        expected = log_probs[np.arange(len(ours.token_ids)), ours.token_ids]
        np.testing.assert_allclose(ours.logprobs, expected, atol=1e-3)
        assert [int(row.argmax()) for row in log_probs] == ours.token_ids
