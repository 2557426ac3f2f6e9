"""The contracts of training and serving, on the forward passes: who is edited when, and that cutting changes nothing.

All runs are float32 on a two-layer model whose logits are within about ±10. ``reference`` is the model in float64.
Each contract also has a twin that breaks it on purpose and must differ by far more than the tolerance. What the engine
adds, ``tests/serve/engine`` holds it to.
"""

import dataclasses
import inspect
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_jax import Adapter, AdapterConfig, random_adapter
from preft_jax.adapters.allocator import BankAllocator
from preft_jax.adapters.bank import init_bank, write_adapter
from preft_jax.adapters.edit_mask import extend_edit_mask, prompt_edit_mask
from preft_jax.adapters.pages import pack_adapter
from preft_jax.loading import serving_params
from preft_jax.models import forward
from preft_jax.models.batch import DecodeBatch, Span, pack_prefill, pack_rows
from preft_jax.models.cache import init_cache
from preft_jax.models.modules import abstract_params
from preft_jax.rope import LinearRope, Llama3Rope
from preft_jax.text.chat import EncodedPrompt, encode_prompt

PREFILL_ONLY = (
    "lora", "lora_r24", "lora_pattern", "direft", "direft_free", "loreft", "loreft_f3l2", "lora_skip",
)  # fmt: skip
ALL_TOKEN = ("lora_all", "loreft_all")
EVERY = (None, *PREFILL_ONLY, *ALL_TOKEN)

ATOL = 1e-4
"""Float32 rounding of log-probabilities through two layers and a head; measured at about 2e-5."""
VISIBLE = 100 * ATOL
"""What a broken contract must change at least."""

ROWS, MAX_LEN, PAGE_SIZE, TOKENS, TILE, ENTRIES, BANK_PAGES = 8, 96, 8, 64, 32, 16, 64
"""One prefill program and one decode program for nearly every test here."""


class Request(NamedTuple):
    """A prompt with an adapter or none."""

    prompt: EncodedPrompt
    adapter: Adapter | None = None
    max_tokens: int = 6

    def mask(self):
        return prompt_edit_mask(self.prompt, None if self.adapter is None else self.adapter.config)


class Run(NamedTuple):
    """Greedy tokens and the raw log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def kinds(adapters):
    """Return adapters by name; None is the base model."""
    return {None: None, **adapters}


class Device:
    """KV cache, bank and programs without an engine, so that a test can call them in any order.

    A request lives in a *row*: a run of KV pages of its own.
    """

    def __init__(self, model):
        self.model = model
        self.params = serving_params(model, ROWS)
        self.width = MAX_LEN // PAGE_SIZE
        self.cache = init_cache(model.config, ROWS * self.width, PAGE_SIZE, np.float32)
        self.bank = init_bank(model.config, BANK_PAGES, np.float32)
        self.allocator = BankAllocator(BANK_PAGES)
        self.places = {}
        self._prefill = jax.jit(
            forward.prefill, static_argnums=0, static_argnames="max_query_len", donate_argnums=3
        )  # fmt: skip
        self._decode = jax.jit(forward.decode, static_argnums=0, donate_argnums=2)
        self._decode_adapted = jax.jit(forward.decode_adapted, static_argnums=0, donate_argnums=4)

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
            mask = extend_edit_mask(one.mask(), len(generated), positions)
        edges = [0, *sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]
        place = self.where(one.adapter)
        return [
            Span(tokens=tokens[start:end], start=start, edit_mask=mask[start:end], kv_pages=self.pages(row),
                 adapter_pages=place)
            for start, end in itertools.pairwise(edges)
        ]  # fmt: skip

    def prefill(self, spans):
        """Run one prefill call; returns the float64 log-softmax of each span's last token."""
        batch = pack_prefill(
            spans, num_tokens=TOKENS, num_requests=ROWS, page_table_width=self.width, page_size=PAGE_SIZE, tile=TILE,
            min_entries=ENTRIES,
        )  # fmt: skip
        logits, self.cache = self._prefill(
            self.model.config, self.params, self.bank, self.cache, batch, max_query_len=TOKENS
        )
        return reference.log_softmax(reference.f64(logits)[: len(spans)])

    def decode(self, row, token, position, count, adapter=None):
        """Decode ``count`` greedy tokens after ``token``, beside idle rows; returns them and their log-probabilities.

        ``adapter``: an all-token one, or None.
        """
        run, config = Run([], []), self.model.config
        tokens, positions, tables = np.zeros(8, np.int32), np.full(8, -1, np.int32), np.zeros((8, self.width), np.int32)
        tables[2] = self.pages(row)
        rows = pack_rows([self.where(adapter) if i == 2 else {} for i in range(8)], min_entries=4)
        for step in range(count):
            tokens[2], positions[2] = token, position + step
            batch = DecodeBatch(tokens.copy(), positions.copy(), tables)
            if adapter is None:
                logits, self.cache = self._decode(config, self.params, self.cache, batch)
            else:
                logits, self.cache = self._decode_adapted(config, self.params, self.bank, rows, self.cache, batch)
            log_probs = reference.log_softmax(reference.f64(logits)[2])
            token = int(log_probs.argmax())
            run.token_ids.append(token)
            run.logprobs.append(log_probs[token])
        return run

    def run(self, one, row=7):
        """Prefill a request at once and decode it greedily, one step a call."""
        (log_probs,) = self.prefill(self.spans(one, row))
        first, count = int(log_probs.argmax()), len(one.prompt.token_ids)
        adapter = None if one.adapter is None or one.adapter.config.prefill_only else one.adapter
        rest = self.decode(row, first, count, one.max_tokens - 1, adapter)
        return Run([first, *rest.token_ids], [log_probs[first], *rest.logprobs])

    def kv(self, row, count):
        """Return keys and values of a row's first ``count`` tokens, float64 ``[2, L, count, K, C]``."""
        own = np.array(self.pages(row))
        rows = [np.asarray(pool)[own].reshape(-1, *pool.shape[2:])[:count] for pool in self.cache.kv]
        return np.array([[row[:, part::2] for row in rows] for part in (0, 1)], np.float64)


@pytest.fixture(scope="module")
def device(lively):
    return Device(lively)


def request(tokens, adapter=None, *, max_tokens=6, spans=()):
    return Request(EncodedPrompt([int(token) for token in tokens], tuple(spans)), adapter, max_tokens)


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


# One model: training's forward, prefill and the reference.

VARIANTS = {
    # Wavelengths of the heads lie on every side of the two bounds.
    "llama3": {
        "rope_scaling": Llama3Rope(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        "rope_theta": 500.0,
        "head_dim": 24,
        "tie_word_embeddings": False,
    },
    "linear": {"rope_scaling": LinearRope(factor=4.0), "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True, "num_key_value_heads": 1},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "sliding_window": {"sliding_window": 5},
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
    mask = one.mask()
    np.testing.assert_array_equal(mask, reference.adapter_mask(adapter, 21))
    (ours,) = device.prefill(device.spans(one, 2))
    np.testing.assert_allclose(ours, last_log_probs(lively, adapter, tokens, mask), atol=ATOL)
    np.testing.assert_allclose(device.kv(2, 21), reference_kv(lively, adapter, tokens, mask), atol=ATOL)
    np.testing.assert_allclose(ours, trained(lively, adapter, tokens, mask)[-1], atol=ATOL)


# Contract 2: the last prompt token is edited, and the first token is drawn from its edited hidden state.


@pytest.mark.parametrize("name", [*PREFILL_ONLY, *ALL_TOKEN])
def test_last_prompt_token_is_edited(name, device, kinds, rng):
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 15), adapter)
    without_last = one.mask()
    without_last[-1] = False
    ours, broken, base = device.prefill(
        device.spans(one, 0) + device.spans(one, 1, mask=without_last) + device.spans(request(one.prompt.token_ids), 2)
    )
    assert np.abs(ours - broken).max() > VISIBLE
    assert np.abs(ours - base).max() > VISIBLE


def test_a_prompt_of_one_token_is_edited(device, kinds, lively):
    one = request([65], kinds["lora"])
    ours, base = device.prefill(device.spans(one, 0) + device.spans(request([65]), 1))
    np.testing.assert_allclose(ours, last_log_probs(lively, one.adapter, [65], np.array([[True, False]])), atol=ATOL)
    assert np.abs(ours - base).max() > VISIBLE


# Contract 3: generated tokens are never edited, also when they are computed again.


@pytest.mark.parametrize("name", EVERY)
def test_a_run_is_the_reference_with_its_mask(name, device, kinds, lively, rng):
    """Prompt edited, generated tokens not, except by all-token adapters: the log-probability of every step."""
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 15), adapter, max_tokens=9)
    ours = device.run(one)
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
def test_recomputing_generated_tokens_gives_the_run_again(name, device, kinds, rng):
    """As after preemption: prompt and generated tokens in one call, at every length that the run went through."""
    adapter = kinds[name]
    one = request(rng.integers(0, 256, 5), adapter, max_tokens=7)
    ours = device.run(one)
    rows = range(7)
    again = device.prefill([device.spans(one, row, generated=ours.token_ids[:row])[0] for row in rows])
    assert [int(row.argmax()) for row in again] == ours.token_ids
    np.testing.assert_allclose(again.max(axis=1), ours.logprobs, atol=ATOL)
    wrong = reference.adapter_mask(adapter, 5, 6)
    wrong[5:, 0] = adapter.config.prefill_only
    (broken,) = device.prefill(device.spans(one, 7, generated=ours.token_ids[:6], mask=wrong))
    assert np.abs(broken - again[6]).max() > VISIBLE


@pytest.mark.parametrize("name", [None, "loreft"])
def test_a_preempted_request_continues_as_if_never_stopped(name, device, kinds, rng):
    """Stopped after five tokens and recomputed in two chunks, one of prompt and generated tokens; then decoded on."""
    one = request(rng.integers(0, 256, 12), kinds[name], max_tokens=10)
    whole = device.run(one)
    for span in device.spans(one, 3, [8], generated=whole.token_ids[:5]):
        (log_probs,) = device.prefill([span])
    token = int(log_probs.argmax())
    assert [token, *device.decode(3, token, 17, 4).token_ids] == whole.token_ids[5:]


# Contract 4: decoding has no adapter.


def test_decode_takes_the_model_the_cache_and_the_rows_and_nothing_else():
    assert list(inspect.signature(forward.decode).parameters) == ["config", "params", "cache", "batch"]


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


# Contract 6: many turns.

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Yo!"},
    {"role": "user", "content": "Sum?"},
]


def turned(adapter, turns):
    return Adapter(dataclasses.replace(adapter.config, assistant_turns=turns), adapter.params)


def test_an_answers_span_is_its_text_and_its_end_of_turn(lively):
    prompt = encode_prompt(lively.tokenizer, [{"role": "system", "content": "Be brief."}, *CHAT], vocab_size=256)
    ((start, end),) = prompt.unedited_spans
    assert lively.tokenizer.decode(prompt.token_ids[:start]).endswith("<|im_start|>assistant\n")
    assert lively.tokenizer.decode(prompt.token_ids[start:end]) == "Yo!<|im_end|>"
    assert lively.tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["lora", "loreft", "loreft_f3l2"])
@pytest.mark.parametrize("turns", ["edit", "skip"])
def test_a_chat_is_edited_by_its_adapters_turn_rule(turns, name, device, kinds, lively):
    """``skip`` leaves the earlier answer as it was generated, ``edit`` edits the whole prompt."""
    adapter = turned(kinds[name], turns)
    prompt = encode_prompt(lively.tokenizer, CHAT, vocab_size=256)
    ((start, end),) = prompt.unedited_spans
    one = Request(prompt, adapter, max_tokens=4)
    ours = device.run(one)
    assert_is_reference(lively, one, ours)
    if name != "loreft_f3l2":
        edited = one.mask()[:, 0]
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
    answer += device.decode(0, answer[0], 11, 5).token_ids
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
    mask = Request(prompt, turned(kinds["lora"], turns)).mask()
    assert mask[:, 0].all()
    assert not mask[:, 1].any()


def test_all_token_adapters_edit_earlier_answers_whatever_their_turn_rule(kinds, lively):
    """They edited them when they generated them."""
    prompt = encode_prompt(lively.tokenizer, CHAT, vocab_size=256)
    assert Request(prompt, turned(kinds["lora_all"], "skip")).mask()[:, 0].all()


def test_masks_of_the_base_model_are_all_false():
    mask = request([1, 2, 3]).mask()
    assert mask.shape == (3, 2)
    assert not mask.any()
