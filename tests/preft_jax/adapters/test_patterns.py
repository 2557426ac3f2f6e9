"""Expressions over module paths: Python's answers where it answers, and a bound on the work whoever wrote them."""

import random
import re

import pytest

from preft_jax.adapters.config import PEFT_MODULES, AdapterConfig
from preft_jax.adapters.patterns import MAX_STEPS, Matcher, parse
from preft_jax.errors import ConfigError

pytestmark = pytest.mark.host

PATHS = ["lm_head", "model.embed_tokens"]
PATHS += [f"model.layers.{layer}.{module}" for layer in range(100) for module in PEFT_MODULES.values()]

HONEST = (
    r".*\.layers\.[01]\.self_attn\.(k|v)_proj",
    r"^(?!.*visual).*(?:q_proj|v_proj|up_proj)",
    r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|o_proj"
    r"|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn)"
    r"\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))",
)
"""Expressions of the kind that fine-tuning tools write."""

HOSTILE = (
    "(a+)+$",
    "(.*)+x",
    "(.*.*)*x",
    "((((.?){1000}){1000}){1000}){1000}x",
    "(.*,){11}P",
    r"(\w+\.?)*$x",
    "(|.?)*!",
)

PIECES = (
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", r"\b", "(", "(?:", ")", "|", "*", "+", "?", "{2}", "{1,2}",
    "{,1}", "{0,}", "*?", "^", "$", "(?=", "(?!", "1", "]", "{", "}", "-", "(?P<n>", "(?<=", r"\1", "(?i)", "*+",
)  # fmt: skip


@pytest.mark.parametrize("expression", HONEST)
def test_honest_expressions_select_what_python_selects_with_steps_to_spare(expression):
    matcher = Matcher(MAX_STEPS // 4)
    found = [path for path in PATHS if matcher.selects(expression, path)]
    assert found == [path for path in PATHS if re.fullmatch(expression, path)]
    assert found


def refusal_of(expression, use=parse):
    try:
        use(expression)
    except ConfigError as error:
        return str(error)
    return None


def test_drawn_expressions_mean_what_python_means():
    rng, compared, matched = random.Random(0), 0, 0
    for _ in range(12_000):
        expression = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
        try:
            compiled = re.compile(expression)
        except re.error:
            compiled = None
        refusal = refusal_of(expression)
        assert (refusal is None) <= (compiled is not None), expression
        assert compiled is None or "not supported" in (refusal or "not supported"), expression
        if refusal is not None or compiled is None:
            continue
        for _ in range(4):
            text = "".join(rng.choice("ab.1") for _ in range(rng.randrange(7)))
            whole, end = compiled.fullmatch(text), re.fullmatch(rf"(?:.*\.)?(?:{expression})", text)
            assert Matcher().selects(expression, text) == (whole is not None), (expression, text)
            assert Matcher().selects_end(expression, text) == (end is not None), (expression, text)
            compared, matched = compared + 1, matched + (whole is not None)
    assert compared > 5000
    assert matched > 200


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_expressions_end(expression):
    """Python's matcher would not: the longest of these takes it longer than there is time."""
    matcher = Matcher(100_000)
    refusal = refusal_of(expression, lambda one: [path for path in PATHS if matcher.selects(one, path)])
    assert "takes more than 100000 steps to match" in (refusal or "takes more than 100000 steps to match")


@pytest.mark.parametrize("expression", ["(((.*)*)*)*x", "(?:(?:.*.*)*.*.*)*x"])
def test_no_part_is_matched_twice_at_one_place(expression):
    assert not Matcher(20_000).selects(expression, PATHS[-1])


def test_steps_are_counted_over_all_matches_of_one_matcher():
    matcher = Matcher(1000)
    with pytest.raises(ConfigError, match=r"'\.\*x' takes more than 1000 steps"):
        [matcher.selects(".*x", PATHS[-1]) for _ in range(1000)]
    Matcher(1000).selects(".*x", PATHS[-1])
    config = AdapterConfig(rank_pattern={"(.*.*)*x": 4, **{f"(.*.*)*{i}": 4 for i in range(500)}})
    with pytest.raises(ConfigError, match="takes more than"):
        [config.rank_at(layer, site) for layer in range(100) for site in PEFT_MODULES]


def test_a_site_is_matched_once_by_each_pattern():
    config = AdapterConfig(rank=4, rank_pattern={r".*layers\.3\..*": 2})
    first = [config.rank_at(3, "q") for _ in range(100_000)]
    assert set(first) == {2}
    assert config.rank_at(2, "q") == 4


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("(", "unclosed parenthesis"),
        (")", "unbalanced parenthesis"),
        ("*", "nothing to repeat"),
        ("a**", "multiple repeat"),
        ("[a", "unterminated set"),
        ("[z-a]", "a set that is none"),
        ("a{3,2}", "a smallest count above the largest"),
        ("a\\", "backslash at the end"),
        (r"(a)\1", "not supported"),
        ("(?<=a)b", "not supported"),
        ("(?i)a", "not supported"),
        ("a*+", "possessive repeat.* not supported"),
        ("(?>a)", "not supported"),
        ("a{1001}", "more than 1000 times.* not supported"),
        ("(" * 100_000, "has 100000 characters; allowed: up to 4096"),
        ("(" * 2000, "groups more than 32 deep.* not supported"),
        ("[[a]]", "a set in a set.* not supported"),
        (3, "3 is no regular expression"),
    ],
)  # fmt: skip
def test_what_is_not_matched_is_refused_by_name(expression, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse(expression)
    assert len(str(raised.value)) < 400
