"""The bodies of OpenAI's completions and chats, with vLLM's additions: every field checked, none ignored in silence."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from preft_jax.errors import did_you_mean
from preft_jax.sampling.parameters import MAX_BIAS, MAX_LOGPROBS, SamplingParams
from preft_jax.text.messages import MESSAGE_NEUTRAL, ROLE_ALIASES, join_text_parts
from serve.engine.request import MAX_SAMPLES

MAX_PROMPTS = 128
"""Prompts of one completion."""

MAX_STOPS = 16
"""Stop texts of one request."""

MAX_STOP_LENGTH = 1_000
"""Characters of a stop text: so many may be held back, and are looked through at every token."""

_INT32, _INT64 = 2**31, 2**63

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that OpenAI's or vLLM's API has and this server has not, and values of them that ask for nothing."""


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


class Body(BaseModel):
    """A body whose fields have exactly the declared types; null means that a field is absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or (name in cls.neutral and _asks_for_nothing(value, cls.neutral[name])):
                continue
            if name in cls.neutral:
                raise _field_error("unsupported_field", name, "is not supported by this server; leave it out")
            if name not in cls.model_fields:
                near = did_you_mean(str(name), cls.model_fields)
                raise _field_error("unknown_field", name, f"is no field of this body{near}; leave it out")
            kept[name] = value
        return kept


def _field_error(kind: Literal["unknown_field", "unsupported_field"], name: str, told: str) -> PydanticCustomError:
    shown = ascii(name)[1:-1][:80]
    return PydanticCustomError(kind, "{shown} {told}", {"field": shown, "shown": shown, "told": told})


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Turn JSON's keys, which are texts, into token ids."""
    if not isinstance(value, dict):
        raise ValueError("give an object from token ids to biases")
    if len(value) > MAX_BIAS:
        raise ValueError(f"it names {len(value)} tokens; give at most {MAX_BIAS}")
    wrong = next((key for key in value if not re.fullmatch(r"\d{1,10}", str(key), re.ASCII)), None)
    if wrong is not None:
        raise ValueError(f"{ascii(wrong)[:80]} is no token id; give whole numbers as keys")
    if len({int(key) for key in value}) < len(value):
        raise ValueError("it names a token more than once; give each token one bias")
    return {int(key): bias for key, bias in value.items()}


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompts(value: Any) -> Any:
    """Turn the four kinds of prompts into a list of texts or token ids."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if isinstance(value, list) and (all(isinstance(item, str) for item in value) or all(map(_are_ids, value))):
        return value
    raise ValueError("give a text, a list of token ids, a list of texts, or a list of lists of token ids; none empty")


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(_texts, json_schema_input_type=str | list[str]),
]
Biases = Annotated[
    dict[Annotated[int, Field(ge=0, lt=_INT32)], Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_biases, json_schema_input_type=dict[str, float]),
    Field(max_length=MAX_BIAS),
]
Prompts = Annotated[
    list[str | list[int]],
    Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
TokenId = Annotated[int, Field(ge=0, lt=_INT32)]
Count = Annotated[int, Field(ge=1, lt=_INT32)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Body):
    """``stream_options``: whether a last chunk tells the usage."""

    neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
    include_usage: bool = False


class Generation(Body):
    """What completions and chats have in common."""

    neutral = NEUTRAL
    model: ModelName
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1, lt=_INT32)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: Biases = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop: Stops = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=128, fail_fast=True)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=0, lt=_INT32)
    user: str | None = Field(None, max_length=512)
    cache_salt: str | None = Field(None, min_length=1, max_length=512)

    @model_validator(mode="after")
    def _fields_agree(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "it needs stream to be true", {"field": "stream_options"})
        return self

    def sampling(self) -> SamplingParams:
        """Return how tokens are drawn; seeds of 64 bits, negative ones too, are taken modulo 2**32."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else self.seed % 2**32,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to tell at each step, or None."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, or None: as many as there is room for."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Generation):
    """The body of ``/v1/completions``."""

    prompt: Prompts
    max_tokens: Count = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        """See ``Generation``."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """See ``Generation``."""
        return self.max_tokens


class Message(Body):
    """A message of a chat."""

    neutral = MESSAGE_NEUTRAL
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(join_text_parts, json_schema_input_type=str | list[dict[str, str]])]


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    """Return messages as the chat renderer takes them."""
    return [{"role": ROLE_ALIASES.get(message.role, message.role), "content": message.content} for message in messages]


class ChatBody(Generation):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _logprobs_agree(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value_error", "it needs logprobs to be true", {"field": "top_logprobs"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        """See ``Generation``."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """See ``Generation``; ``max_tokens`` is the older name."""
        return self.max_completion_tokens or self.max_tokens


class TokenizeBody(Body):
    """The body of ``/tokenize``: a text or a chat, which become the tokens that they are as a prompt."""

    neutral = {"continue_final_message": (False,)}
    model: ModelName | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, fail_fast=True)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("value_error", "give either prompt or messages", {"field": "prompt"})
        return self


class DetokenizeBody(Body):
    """The body of ``/detokenize``."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


class LoadBody(Body):
    """The body of ``/v1/load_lora_adapter``; ``owner`` and ``pinned`` are ours."""

    lora_name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    owner: str | None = Field(None, min_length=1, max_length=128)
    pinned: bool = False


class UnloadBody(Body):
    """The body of ``/v1/unload_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=256)


MAX_HYPERPARAMETERS = 64
"""Hyperparameters of a fine-tuning job."""

Hyperparameters = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_]*$")],
        bool | int | float | Annotated[str, Field(max_length=1_000)] | None,
    ],
    Field(max_length=MAX_HYPERPARAMETERS),
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
FileId = Annotated[str, Field(min_length=1, max_length=64)]


class Supervised(Body):
    """``method.supervised``."""

    hyperparameters: Hyperparameters = Field(default_factory=dict)


class Method(Body):
    """How a fine-tuning job learns; of OpenAI's methods there is the supervised one."""

    neutral = {"dpo": (), "reinforcement": ()}
    type: Literal["supervised"]
    supervised: Supervised = Field(default_factory=Supervised)


class FineTuningBody(Body):
    """The body of ``/v1/fine_tuning/jobs``; ``priority`` is ours, so are hyperparameters named as in ``train.sft``."""

    neutral = {"integrations": ([],)}
    model: ModelName
    training_file: FileId
    validation_file: FileId | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters = Field(default_factory=dict)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]*$")
    seed: int | None = Field(None, ge=0, lt=_INT32)
    metadata: Metadata = Field(default_factory=dict)
    priority: int = Field(0, ge=-100, le=100)

    @model_validator(mode="after")
    def _one_place(self) -> "FineTuningBody":
        if self.hyperparameters and self.method is not None and self.method.supervised.hyperparameters:
            raise PydanticCustomError(
                "value_error", "they are in method too; give them in one place", {"field": "hyperparameters"}
            )
        return self

    @property
    def asked(self) -> dict[str, Any]:
        """Hyperparameters by name, wherever they were given; null means that one is absent."""
        given = self.hyperparameters or (self.method.supervised.hyperparameters if self.method is not None else {})
        return {name: value for name, value in given.items() if value is not None}
