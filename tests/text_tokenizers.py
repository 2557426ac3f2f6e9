"""Small tokenizers of the kinds that models come with, built in code: what each adds, merges and falls back to."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from preft_jax.text.tokenizer import byte_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    *"abcdefghijklmnopqrstuvwxyzABC0123456789.!?\n",
    "▁h",
    "he",
    "▁the",
    "the",
    "lo",
    "▁hello",
    "섬",
    "日",
    "ầ",
    "▁.",
]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *("".join(pair) for pair in zip("abcdef", "bcdefg", strict=True))]
MERGES = [("▁", "h"), ("h", "e"), ("l", "o"), ("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f"), ("f", "g")]


def wrap(backend, **fields):
    """Wrap a backend as models' directories do."""
    fields = {"eos_token": "</s>", "clean_up_tokenization_spaces": False} | fields
    return PreTrainedTokenizerFast(tokenizer_object=backend, **fields)


def _pieces(**fields):
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    model = models.BPE(vocab=vocab, merges=MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    return backend, {"bos_token": "<s>", "unk_token": "<unk>", **fields}


_STRIPPED = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def llama2(**fields):
    """Llama 2: a space before every text and behind every special token, bytes for what is not in the vocabulary."""
    backend, fields = _pieces(**fields)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(_STRIPPED)
    return wrap(backend, **fields)


def gemma(**fields):
    """Gemma: the same without a space before texts."""
    backend, fields = _pieces(**fields)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(_STRIPPED[:3])
    return wrap(backend, **fields)


def metaspace(scheme="first", **fields):
    """Newer Llamas' and Mistrals': Metaspace puts the space, at the beginning of a text or everywhere."""
    backend, fields = _pieces(**fields)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(_STRIPPED)
    return wrap(backend, **fields)


def unigram(**fields):
    """T5's line: unigram pieces, the Metaspace decoder, no fallback, and an end behind every text."""
    scores = [(piece, -2.0 - (i % 7) / 3 + len(piece)) for i, piece in enumerate(["<unk>", "</s>", *WORDS])]
    backend = Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["</s>"])
    return wrap(backend, unk_token="<unk>", **fields)


def byte_level(*, split=True, **fields):
    """Byte-level BPE with merges across line ends and bytes of characters, and added tokens that are no letters."""
    single = byte_tokenizer()
    vocab, merges = single.get_vocab(), [("Ċ", "Ċ"), ("Ġ", "a"), ("a", "b"), ("Ã", "©"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<｜end▁of▁sentence｜>"])
    backend.add_tokens(["<tool>", "<té>", "日本"])
    fields = {"eos_token": "<|im_end|>", "chat_template": single.chat_template} | fields
    return wrap(backend, bos_token="<|im_start|>", **fields)


def llama3(**fields):
    """Byte-level with Llama 3's split and a BOS that its post-processor puts."""
    tokenizer = byte_level(**fields)
    backend = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"),
                                 "isolated")  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return with_template(tokenizer, "<|im_start|> $A")


def word_piece(**fields):
    """A tokenizer of another kind: its decoder is no chain of pieces."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "</s>", "a", "b", "##a", "##b", "ab", ".", "<0x41>"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["</s>"])
    return wrap(backend, unk_token="<unk>", **fields)


def with_template(tokenizer, single):
    """Let a tokenizer's post-processor put tokens around every text."""
    backend = tokenizer.backend_tokenizer
    names = [name for name in single.split() if not name.startswith("$")]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, backend.token_to_id(name)) for name in names]
    )
    return tokenizer


KINDS = {
    "byte level": byte_level,
    "llama 3": llama3,
    "llama 2": llama2,
    "gemma": gemma,
    "metaspace first": metaspace,
    "metaspace always": lambda: metaspace("always"),
    "unigram": unigram,
    "word piece": word_piece,
}
