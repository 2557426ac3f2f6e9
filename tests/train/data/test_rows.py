"""From rows to examples: the tokens and edits that serving would make, and which of them are learned."""

import dataclasses

import numpy as np
import pytest
import reference
import train_cases as cases
from tokenizers import processors
from train_cases import CHAT, LORA, SKIP

from preft_jax import AdapterConfig, RequestError
from preft_jax.adapters.edit_mask import prompt_edit_mask
from preft_jax.text.chat import encode_prompt, render_chat
from preft_jax.text.tokenizer import byte_tokenizer
from train.data.rows import DataOptions, load_examples, make_examples

pytestmark = pytest.mark.host

END = "<|im_end|>"
ALL = AdapterConfig(rank=2, positions="all")
ENDS = AdapterConfig(kind="loreft", rank=2, positions="f7+l7", share_weights=False)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_end(model, tokenizer=None):
    """Return a model of random weights whose answers end with the end of a turn."""
    config = dataclasses.replace(model.config, eos_token_ids=(255,))
    return dataclasses.replace(model, config=config, tokenizer=tokenizer or model.tokenizer)


@pytest.fixture(params=["bytes", "smollm2"])
def model(request, tiny_text):
    return with_end(tiny_text) if request.param == "bytes" else request.getfixturevalue("smollm2_text")


def one(row, model, adapter=LORA, **options):
    (example,) = make_examples(row, model, adapter, DataOptions(**options))
    return example


def text(rng, most=40):
    return "".join(rng.choice(list("abcXYZ 0123.,'\né🦉"), int(rng.integers(1, most))))


def conversation(rng, turns):
    messages = [{"role": "system", "content": text(rng)}] if rng.integers(2) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
    return messages


def runs_of(flags):
    """Return the half-open spans in which flags are set."""
    edges = np.flatnonzero(np.diff([0, *np.asarray(flags, int), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def learned(example, model):
    return [model.tokenizer.decode(example.token_ids[slice(*span)]) for span in runs_of(example.loss_mask)]


def test_a_pair_is_the_served_prompt_and_behind_it_the_completion_and_its_end(model, rng):
    for prompt, completion in [("The owl", "s hoot."), ("2 + 2 = ", "4"), *((text(rng), text(rng)) for _ in range(8))]:
        example = one({"prompt": prompt, "completion": completion}, model)
        served = encode_prompt(model.tokenizer, prompt, vocab_size=model.config.vocab_size)
        assert example.prompt == served
        assert example.token_ids[: len(served.token_ids)].tolist() == served.token_ids
        assert example.token_ids[len(served.token_ids) :].tolist() == example.answer
        assert model.tokenizer.decode(example.answer) == completion + END
        assert runs_of(example.loss_mask) == [(len(served.token_ids), len(example))]


def test_tokens_that_begin_every_text_begin_the_prompt_only(tiny_text):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 254)]
    )
    example = one({"prompt": "ab", "completion": "cd"}, with_end(tiny_text, tokenizer))
    assert example.token_ids.tolist() == [254, *b"abcd", 255]


def test_an_end_that_the_completion_has_is_not_doubled_and_a_model_without_one_gets_none(tiny_text):
    row = {"prompt": "ab", "completion": "cd" + END}
    assert one(row, with_end(tiny_text)).answer == [*b"cd", 255]
    assert one({**row, "completion": "cd"}, tiny_text).answer == list(b"cd")


def test_a_chat_is_its_template_through_the_end_of_the_answer(tiny_text):
    example = one({"messages": CHAT[:2]}, tiny_text)
    assert tiny_text.tokenizer.decode(example.token_ids) == (
        f"<|im_start|>user\nWhat does the owl do?{END}\n<|im_start|>assistant\nIt hoots.{END}"
    )
    assert learned(example, tiny_text) == [f"It hoots.{END}"]
    assert example.prompt == render_chat(tiny_text.tokenizer, CHAT[:1])


@pytest.mark.parametrize("completion", ["It hoots.", [CHAT[1]]])
def test_prompt_and_completion_may_be_messages(completion, model):
    pair, chat = one({"prompt": CHAT[:1], "completion": completion}, model), one({"messages": CHAT[:2]}, model)
    np.testing.assert_array_equal(pair.token_ids, chat.token_ids)
    np.testing.assert_array_equal(pair.loss_mask, chat.loss_mask)
    assert pair.prompt == chat.prompt


@pytest.mark.parametrize("adapter", [LORA, SKIP, ALL, ENDS, AdapterConfig(kind="loreft", rank=2, positions="f3+l2")])
def test_the_rule_is_counted_in_the_prompt_and_answers_are_edited_by_all_token_adapters_only(adapter, model, rng):
    rows = [{"prompt": text(rng), "completion": text(rng)} for _ in range(5)]
    for row in [*rows, {"prompt": "abcdefghijklmnopqrstuvwxyz", "completion": "a"}, {"messages": CHAT[:2]}]:
        example = one(row, model, adapter)
        prompt = len(example.prompt.token_ids)
        expected = reference.edit_mask(prompt, adapter.positions, adapter.groups, generated=len(example) - prompt)
        np.testing.assert_array_equal(example.edit_mask, expected)
        np.testing.assert_array_equal(example.edit_mask[:prompt], prompt_edit_mask(example.prompt, adapter))
        assert example.edit_mask[prompt - 1].any() == (prompt > 1 or adapter.positions in ("prompt", "all"))
        assert example.edit_mask[prompt:].any() == (adapter is ALL)


@pytest.mark.parametrize("adapter", [LORA, ENDS])
def test_each_answer_is_a_row_of_its_own_whose_prompt_is_everything_before_it(adapter, model):
    rows = make_examples({"messages": CHAT}, model, adapter, DataOptions())
    assert [learned(row, model) for row in rows] == [[f"It hoots.{END}"], [f"They hoot{END}"]]
    for row, messages in zip(rows, (CHAT[:1], CHAT[:3]), strict=True):
        assert row.prompt == render_chat(model.tokenizer, messages)
        count = len(row.prompt.token_ids)
        expected = reference.edit_mask(count, adapter.positions, adapter.groups, generated=len(row) - count)
        np.testing.assert_array_equal(row.edit_mask, expected)


@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_with_a_marker_each_answer_is_a_row_edited_from_its_own_last_marker_on(positions, model):
    header = encode_prompt(model.tokenizer, "<|im_start|>assistant\n", vocab_size=model.config.vocab_size).token_ids
    adapter = AdapterConfig(rank=2, positions=positions, alora_invocation_tokens=tuple(header))
    rows = make_examples({"messages": CHAT}, model, adapter, DataOptions())
    assert [learned(row, model) for row in rows] == [[f"It hoots.{END}"], [f"They hoot{END}"]]
    for row in rows:
        count = len(row.prompt.token_ids)
        last = len(row) if positions == "all" else count
        assert np.flatnonzero(row.edit_mask[:, 0]).tolist() == list(range(count - len(header), last))


def test_a_marker_in_a_conversation_of_one_row_is_refused(model):
    adapter = dataclasses.replace(SKIP, alora_invocation_tokens=(1,))
    with pytest.raises(RequestError, match="alora_invocation_tokens are counted in each request's prompt"):
        make_examples({"messages": CHAT}, model, adapter, DataOptions())


def test_prompts_without_the_marker_are_counted_in_the_log(tiny_text, tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "xb", "completion": "c"}\n')
    adapter = AdapterConfig(rank=2, alora_invocation_tokens=(ord("a"),))
    plain, unmarked = load_examples(tmp_path / "rows.jsonl", with_end(tiny_text), adapter, DataOptions())
    assert plain.edit_mask.any()
    assert not unmarked.edit_mask.any()
    assert "1 prompts do not hold the adapter's alora_invocation_tokens; nothing is edited in them" in caplog.text


def test_a_conversation_whose_answers_are_skipped_is_one_row_that_learns_all_of_them(model):
    row = one({"messages": CHAT}, model, SKIP)
    assert learned(row, model) == [f"It hoots.{END}", f"They hoot{END}"]
    np.testing.assert_array_equal(row.edit_mask[:, 0], ~row.loss_mask)
    assert not row.edit_mask[:, 1].any()
    for start, _ in runs_of(row.loss_mask):
        assert model.tokenizer.decode(row.token_ids[:start]).endswith("<|im_start|>assistant\n")
    assert row.prompt == render_chat(model.tokenizer, CHAT[:3])
    assert row.token_ids.tolist() == [*row.prompt.token_ids, *row.answer]


@pytest.mark.parametrize("adapter", [LORA, SKIP, ALL, ENDS])
def test_every_answer_of_a_conversation_follows_the_tokens_and_edits_that_serving_makes_of_its_prompt(
    adapter, model, rng
):
    for turns in (1, 2, 3, 4):
        messages = conversation(rng, turns)
        served = [
            render_chat(model.tokenizer, messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"
        ]
        rows = make_examples({"messages": messages}, model, adapter, DataOptions())
        found = [(row, start) for row in rows for start, _ in runs_of(row.loss_mask)]
        for (row, start), prompt in zip(found, served, strict=True):
            assert row.token_ids[:start].tolist() == prompt.token_ids
            np.testing.assert_array_equal(row.edit_mask[:start], prompt_edit_mask(prompt, adapter))
        assert all(row.edit_mask.any(axis=1).all() == (adapter is ALL) for row in rows)
        assert len(rows) == (1 if adapter in (SKIP, ALL) else turns)


@pytest.mark.parametrize("adapter", [LORA, SKIP, ALL])
def test_an_answer_that_opens_a_chat_is_not_learned(adapter, tiny_text):
    opening = {"role": "assistant", "content": "Hello!"}
    for answers, messages in ((["It hoots."], CHAT[:2]), (["It hoots.", "They hoot"], CHAT)):
        rows = make_examples({"messages": [opening, *messages]}, tiny_text, adapter, DataOptions())
        assert [part for row in rows for part in learned(row, tiny_text)] == [answer + END for answer in answers]
        start, end = rows[0].prompt.unedited_spans[0]
        assert tiny_text.tokenizer.decode(rows[0].token_ids[start:end]) == f"Hello!{END}"
        assert set(rows[0].edit_mask[start:end, 0].tolist()) == {adapter is not SKIP}


def test_what_of_chats_is_not_learned_is_counted(tmp_path, tiny_text, caplog):
    opening, why = {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Why?"}
    chats = [[opening, *CHAT], CHAT, [*CHAT, why], [opening, *CHAT, why]]
    path = cases.write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    load_examples(path, tiny_text, LORA, DataOptions(max_length=1024))
    told = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "2 chats begin with an answer, which is not learned: it has no prompt",
        "2 chats go on after their last answer; that is left out",
    ]


@pytest.mark.parametrize("adapter", [LORA, SKIP])
def test_what_follows_the_last_answer_is_left_out(adapter, tiny_text):
    for row, same in zip(
        make_examples({"messages": [*CHAT, {"role": "user", "content": "Why?"}]}, tiny_text, adapter, DataOptions()),
        make_examples({"messages": CHAT}, tiny_text, adapter, DataOptions()),
        strict=True,
    ):
        np.testing.assert_array_equal(row.token_ids, same.token_ids)


def test_a_template_that_rewrites_answers_is_refused_only_where_they_are_skipped(tiny_text):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = REWRITES
    model = with_end(tiny_text, tokenizer)
    messages = [{**m, "content": "<think>so</think>" + m["content"]} if i == 1 else m for i, m in enumerate(CHAT)]
    rows = make_examples({"messages": messages}, model, LORA, DataOptions())
    assert [learned(row, model) for row in rows] == [[f"<think>so</think>It hoots.{END}"], [f"They hoot{END}"]]
    assert "think" not in tokenizer.decode(rows[1].token_ids)
    with pytest.raises(RequestError, match="differently in later turns"):
        make_examples({"messages": messages}, model, SKIP, DataOptions())


def test_positions_counted_in_each_prompt_are_refused_where_answers_share_a_row(tiny_text):
    adapter = AdapterConfig(rank=2, positions="f7+l7", assistant_turns="skip")
    with pytest.raises(RequestError, match="'f7\\+l7' are counted in each request's prompt"):
        make_examples({"messages": CHAT}, tiny_text, adapter, DataOptions())
    assert len(make_examples({"messages": CHAT[:2]}, tiny_text, adapter, DataOptions())) == 1


def test_every_token_but_the_first_is_learned_if_asked_for(tiny_text):
    for adapter in (LORA, SKIP):
        for example in make_examples({"messages": CHAT}, tiny_text, adapter, DataOptions(completion_only_loss=False)):
            assert runs_of(example.loss_mask) == [(1, len(example))]
    assert one({"prompt": "ab", "completion": "c"}, tiny_text).loss_mask.tolist() == [False, False, True]


def test_longer_examples_are_refused_or_cut_at_the_end(tiny_text):
    row = {"prompt": "abcde", "completion": "fghij"}
    assert len(one(row, tiny_text, max_length=10)) == 10
    with pytest.raises(RequestError, match=r"10 tokens and max_length is 9.*--truncate"):
        make_examples(row, tiny_text, LORA, DataOptions(max_length=9))
    cut = one(row, tiny_text, max_length=6, truncate=True)
    assert (cut.token_ids.tobytes(), len(cut.edit_mask), runs_of(cut.loss_mask)) == (
        np.array(list(b"abcdef"), np.int32).tobytes(), 6, [(5, 6)],
    )  # fmt: skip
    assert not one(row, tiny_text, max_length=5, truncate=True).loss_mask.any()
