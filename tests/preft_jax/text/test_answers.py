"""What is learned as an answer, by templates that cut reasoning, end no turn, or have tools."""

import pytest

from preft_jax import RequestError
from preft_jax.text.chat import encode_answer, render_chat
from preft_jax.text.tokenizer import byte_tokenizer

pytestmark = pytest.mark.host

USER = {"role": "user", "content": "Capital of Peru?"}
ROLES = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = ROLES + "{{ m['content'] }}<|im_end|>{% endfor %}" + HEADER
CUT = ROLES + "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + ROLES + "{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function']['name'] }} "
    "{{ call['function']['arguments'] | tojson }}</call>{% endfor %}<|im_end|>{% endfor %}" + HEADER
)
TEXT_ARGUMENTS = TOOLS.replace(
    "{{ call['function']['arguments'] | tojson }}", "{{ 'json ' + call['function']['arguments'] }}"
)
NONE_BESIDE_CALLS = TOOLS.replace("or [] %}", "if m['content'] is none %}").replace(
    "{{ m['content'] }}", "{{ m['content'] or '' }}"
)
TOOL = {"name": "set_lamp", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}}}
CALLS = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "function": {"name": "set_lamp", "arguments": '{"on": false}'}}],
}


def answer(template, content, *before, tools=None, **message):
    """Return the texts of prompt and answer."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    message = {"role": "assistant", "content": content, **message}
    prompt, ids = encode_answer(tokenizer, [*(before or [USER]), message], tools=tools)
    assert prompt == render_chat(tokenizer, list(before or [USER]), tools=tools)
    return tokenizer.decode(prompt.token_ids), tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "content", "learned"),
    [
        (CUT + OPENS, "<think>\nPeru.\n</think>\n\nLima.", "Peru.\n</think>\n\nLima.<|im_end|>"),
        (CUT + OPENS, "Peru.\n</think>\n\nLima.", "Peru.\n</think>\n\nLima.<|im_end|>"),
        (CUT + OPENS, "<think>Peru.</think>Lima.", "Peru.</think>Lima.<|im_end|>"),
        (CUT + OPENS, "Lima.", "\n</think>\n\nLima.<|im_end|>"),
        (CUT + OPENS, "<b>Lima</b>", "\n</think>\n\n<b>Lima</b><|im_end|>"),
        (CUT + HEADER, "<think>\nPeru.\n</think>\n\nLima.", "<think>\nPeru.\n</think>\n\nLima.<|im_end|>"),
        (CUT + HEADER, "Lima.", "Lima.<|im_end|>"),
    ],
)
def test_reasoning_that_the_template_cuts_is_learned_where_it_is_generated(template, content, learned):
    prompt, found = answer(template, content)
    assert found == learned
    assert prompt.endswith("<think>\n") == (OPENS in template)


@pytest.mark.parametrize(
    ("template", "content", "learned"),
    [
        (PLAIN + "{% if add_generation_prompt %}assistant: {% endif %}", "Lima.", "Lima.<|im_end|>"),
        (PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}", "Lima. ", " Lima. <|im_end|>"),
        (
            PLAIN.replace("\n", "[END]\n") + "{% if add_generation_prompt %}assistant:{% endif %}",
            "Lima", " Lima[END]<|im_end|>",
        ),
        (PLAIN.replace("\n", ""), "Lima", "assistant: Lima<|im_end|>"),
    ],
)  # fmt: skip
def test_an_answer_that_no_special_token_ends_is_ended_by_the_end_of_sequence(template, content, learned):
    assert answer(template, content)[1] == learned


def test_what_a_template_writes_behind_the_end_of_a_turn_is_not_learned():
    template = ROLES + "{{ m['content'] }}<|im_end|>.{% endfor %}" + HEADER
    assert answer(template, "Lima")[1] == "Lima<|im_end|>"


def test_a_template_that_does_not_tell_the_answer_says_why():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.eos_token = None
    with pytest.raises(RequestError, match="without a special token, and the tokenizer has no end of sequence"):
        encode_answer(tokenizer, [USER, {"role": "assistant", "content": "Lima"}])
    for template, reason in (
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "the prompt differently"),
        (CUT + "{% if add_generation_prompt %}<|im_start|>assistant\n(in short) {% endif %}", "the prompt differently"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=reason):
            answer(template, "Lima")


@pytest.mark.parametrize("template", [TOOLS, TEXT_ARGUMENTS, NONE_BESIDE_CALLS])
def test_tools_calls_and_results_are_rendered_as_the_template_reads_them(template):
    prompt, found = answer(template, None, tools=[TOOL], **CALLS)
    assert prompt.startswith('tools: [{"type": "function"')
    assert '"set_lamp"' in prompt
    assert found.endswith('{"on": false}</call><|im_end|>')
    result = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
    prompt, found = answer(template, "It is off.", USER, CALLS, result, tools=[TOOL])
    assert '{"on": false}</call><|im_end|><|im_start|>tool\nok<|im_end|>' in prompt
    assert found == "It is off.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "before", "tools", "reason"),
    [
        (CHATML, [USER], [TOOL], "does not render tools"),
        (CHATML, [USER, CALLS], None, r"render messages\[1\]\['tool_c"),
        (
            TOOLS.replace("{{ m['content'] }}", "{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}"),
            [USER, CALLS, {"role": "tool", "content": "ok"}], [TOOL], r"render messages\[2\], a tool's result",
        ),
        (
            CHATML.replace("{{ m", "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m", 1),
            [USER, {"role": "tool", "content": "ok"}], None, r"render these messages \(no tools\)",
        ),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_in_silence_is_refused(template, before, tools, reason):
    with pytest.raises(RequestError, match=reason):
        answer(template, "Done.", *before, tools=tools)
