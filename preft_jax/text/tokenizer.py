"""Tokenizers, each a transformers ``PreTrainedTokenizerFast``: of a model directory, of a GGUF file, or of bytes.

No function here needs torch. A GGUF file's tokenizer is built from its fields because transformers' own reader drops
the split into digits that SmolLM2 was trained with.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from preft_jax.errors import ModelError, did_you_mean
from preft_jax.text.detokenizer import detokenizer_of

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
"""GGUF token types that are matched in the text before anything is split."""


@contextmanager
def _without_torch_notice() -> Iterator[None]:
    """Import transformers without its notice that models need torch: only tokenizers are used here."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _wrap(tokenizer: Tokenizer, **fields: Any) -> Any:
    """Wrap a tokenizer of the ``tokenizers`` package, which encodes and decodes only, so that it renders chats too."""
    with _without_torch_notice():
        from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **fields)


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token for each byte, 256 in all, for models with random weights.

    Two bytes that UTF-8 never uses, 254 and 255, are ``<|im_start|>`` and ``<|im_end|>``, the end of a turn.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {letters[byte]: byte for byte in range(254)} | {"<|im_start|>": 254, "<|im_end|>": 255}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return _wrap(tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=_CHATML)


_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a Hugging Face model directory, or return ``None`` if it has no tokenizer files.

    ``tokenizer.json`` is taken as it stands. transformers' ``AutoTokenizer`` would rebuild its pre-tokenizer from the
    class that ``tokenizer_config.json`` names, which for SmolLM2 (``GPT2Tokenizer``) loses the split into digits.

    Raises:
        ModelError: if the files cannot be read.
    """
    present = [name for name in _VOCABULARY_FILES if (directory / name).is_file()]
    if not present and (directory / "tokenizer_config.json").is_file():
        raise ModelError(
            f"{directory} has tokenizer_config.json and no vocabulary; allowed: {', '.join(_VOCABULARY_FILES)}. "
            "Restore one, or remove the file to use the model with token ids only"
        )
    if not present:
        return None
    with _without_torch_notice():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    loader = PreTrainedTokenizerFast if present[0] == "tokenizer.json" else AutoTokenizer
    advice = "remove its files to use the model with token ids only"
    try:
        tokenizer = loader.from_pretrained(directory, local_files_only=True, fix_mistral_regex=False)
        fast = isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer)
        if fast:
            detokenizer_of(tokenizer)
    except Exception as error:
        raise ModelError(
            f"cannot read the tokenizer in {directory} ({', '.join(present)}): {type(error).__name__}: {error}; "
            f"restore its files, or {advice}"
        ) from error
    if not fast:
        raise ModelError(
            f"the tokenizer in {directory} is a {type(tokenizer).__name__}, which has no fast form; save it as "
            f"tokenizer.json, or {advice}"
        )
    return tokenizer


def _split_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)])


def _split_words() -> Any:
    return _byte_level(use_regex=True)


def _split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level(use_regex=False)])


def _byte_level(*, use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _pre_tokenizer(name: str, where: str) -> Any:
    """Return the pre-tokenizer that a GGUF file names in ``tokenizer.ggml.pre``."""
    known = {
        "smollm": _split_digits,
        "gpt-2": _split_words,
        "llama-bpe": lambda: _split_by(_LLAMA3_SPLIT),
        "llama3": lambda: _split_by(_LLAMA3_SPLIT),
        "qwen2": lambda: _split_by(_QWEN2_SPLIT),
    }
    if name not in known:
        raise ModelError(
            f"{where} has the unsupported tokenizer.ggml.pre {name!r}{did_you_mean(str(name), known)}; allowed: "
            f"{', '.join(known)}. Load the model's Hugging Face directory instead"
        )
    return known[name]()


def gguf_tokenizer(metadata: Mapping[str, Any], vocab_size: int, where: str) -> Any:
    """Build the tokenizer that a GGUF file's metadata describes, or return ``None`` if it describes none.

    Args:
        metadata: the file's metadata as ``gguf_file.open_gguf`` returns it.
        vocab_size: rows of the embedding, which may be more than there are tokens.
        where: the file, for errors.

    Raises:
        ModelError: for tokenizers other than byte-level BPE, an unknown pre-tokenizer, or fields that disagree.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = fields.get("model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind != "gpt2":
        raise ModelError(
            f"{where} has a tokenizer of type {kind!r}, which is not supported; allowed: 'gpt2' (byte-level BPE). "
            "Load the model's Hugging Face directory instead"
        )
    tokens, types = fields.get("tokens", []), fields.get("token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    if not tokens or len(vocab) != len(tokens) or len(tokens) > vocab_size:
        raise ModelError(
            f"{where} has {len(tokens)} tokens, {len(vocab)} of them distinct, for an embedding of {vocab_size} rows; "
            "convert the model again"
        )
    if types is not None and len(types) != len(tokens):
        raise ModelError(f"{where} has {len(tokens)} tokens and {len(types)} token types; convert the model again")
    tokenizer = _build_bpe(vocab, fields, where)
    _add_special_tokens(tokenizer, tokens, [] if types is None else types.tolist())
    return _wrap(
        tokenizer, **_named_tokens(fields, tokens, where), chat_template=metadata.get("tokenizer.chat_template")
    )


def _build_bpe(vocab: dict[str, int], fields: Mapping[str, Any], where: str) -> Tokenizer:
    pre = fields.get("pre", "gpt-2")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("merges", [])]
    # Llama 3's vocabulary has whole words that its merges do not reach.
    whole_words_first = pre in ("llama-bpe", "llama3")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words_first))
    except Exception as error:
        raise ModelError(f"{where} has a tokenizer whose merges do not fit its tokens: {error}") from error
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, where)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    def of_type(*wanted: int) -> list[str]:
        return [token for token, kind in zip(tokens, types, strict=False) if kind in wanted]

    def added(token: str, special: bool) -> AddedToken:
        return AddedToken(token, special=special, normalized=False)

    tokenizer.add_special_tokens([added(token, True) for token in of_type(_CONTROL, _UNKNOWN)])
    tokenizer.add_tokens([added(token, False) for token in of_type(_USER_DEFINED)])


def _named_tokens(fields: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    """Return the fields of ``PreTrainedTokenizerFast`` that name special tokens and say which are added to a text."""
    named: dict[str, Any] = {}
    for field, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("unk_token", "unknown_token_id"),
                       ("pad_token", "padding_token_id")):  # fmt: skip
        token = fields.get(key)
        if token is None:
            continue
        if not isinstance(token, int) or not 0 <= token < len(tokens):
            raise ModelError(f"{where} has tokenizer.ggml.{key} = {token!r}; it has tokens 0 to {len(tokens) - 1}")
        named[field] = tokens[token]
    add_bos = fields.get("add_bos_token", fields.get("pre") in ("llama-bpe", "llama3"))
    named["add_bos_token"] = bool(add_bos) and "bos_token" in named
    named["add_eos_token"] = bool(fields.get("add_eos_token", False)) and "eos_token" in named
    return named
