import json

import pytest

from preft_jax.errors import ConfigError
from serve.bench.datasets import Conversation, read_sharegpt, read_trace

pytestmark = pytest.mark.host


def turns(*values):
    return {"conversations": [{"from": who, "value": text} for who, text in values]}


CHAT = turns(("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "more"))


def test_conversations_are_read_from_lines_and_from_a_list(tmp_path):
    path = tmp_path / "chats"
    path.write_text(json.dumps(CHAT) + "\n\n" + json.dumps(turns(("human", "alone"))) + "\n")
    assert read_sharegpt(path) == [Conversation("q", "a")]
    path.write_text(json.dumps([CHAT, turns(("user", "x\u2028"), ("assistant", "y"))], indent=1, ensure_ascii=False))
    assert read_sharegpt(path) == [Conversation("q", "a"), Conversation("x\u2028", "y")]


def test_lines_end_at_newlines_only(tmp_path):
    path = tmp_path / "chats"
    path.write_text(json.dumps(turns(("human", "x\u2028\x0c"), ("gpt", "y")), ensure_ascii=False), encoding="utf-8")
    assert read_sharegpt(path) == [Conversation("x\u2028\x0c", "y")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"conversations": []}\n{"conv', "line 2: "),
        ('[\n{"conversations": []},\n{]', "line 3: "),
        (json.dumps(CHAT) + "\n[1]", "line 2: an object with a list"),
        (json.dumps([CHAT, {"text": 1}]), "entry 2: an object with a list"),
        ('{"conversations": [{"from": "human"}]}', "line 1: a turn is expected"),
        ("", "holds no conversation"),
        ('{"conversations": [{"from": "human", "value": "q"}]}', "holds no conversation"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "chats"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_sharegpt(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "chats"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_sharegpt(path)
    with pytest.raises(ConfigError, match="CSV"):
        read_trace(path)


TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:16:46.6805900,879,55
"""


def test_a_trace_is_cut_and_sped_up(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    trace = read_trace(path, minutes=1, speedup=2)
    assert (trace.arrivals, trace.prompt_lens, trace.output_lens) == ([0.0, 2.0], [374, 396], [44, 109])
    assert read_trace(path).arrivals == [0.0, 4.0, 60.0]
    assert read_trace(path, limit=1).prompt_lens == [374]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: no column 'TIMESTAMP'"),
        (TRACE + "soon,1,2\n", "line 5: TIMESTAMP is 'soon'"),
        (TRACE + "2023-11-16 18:15:50,x,2\n", "line 5: ContextTokens is 'x'"),
        (TRACE + "2023-11-16 18:15:50,5,0\n", "line 5: GeneratedTokens is '0'"),
        (TRACE + "2023-11-16 18:15:50,5\n", "line 5: GeneratedTokens is None"),
        (TRACE.splitlines()[0], "holds no requests"),
        ("", "line 1: no column"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


@pytest.mark.parametrize("options", [{"minutes": 0}, {"speedup": 0}, {"speedup": float("inf")}])
def test_impossible_cuts_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="--trace-"):
        read_trace(tmp_path / "absent", **options)
