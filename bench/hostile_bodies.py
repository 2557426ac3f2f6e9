"""Bodies of some MiB in many shapes of wrongness: by name the endpoint, the body, and the parameter that is told."""


def _filled(size, before, unit, after):
    return (before + unit * ((size - len(before) - len(after)) // len(unit))).rstrip(b",") + after


def hostile_bodies(size):
    """Return ``{name: (path, raw body)}``, each of about ``size`` bytes."""
    text, chat = b'{"model":"tiny","prompt":"a",', b'{"model":"tiny","messages":['
    completions, chats = "/v1/completions", "/v1/chat/completions"
    names = b",".join(b'"%06x":0' % i for i in range(size // 12))
    return {
        "negative tokens": ("/detokenize", _filled(size, b'{"tokens":[', b"-1,", b"]}")),
        "texts for tokens": ("/detokenize", _filled(size, b'{"tokens":[', b'"aaaaaaaaaaaaaa",', b"]}")),
        "numbers for messages": (chats, _filled(size, chat, b"0,", b"]}")),
        "empty messages": (chats, _filled(size, chat, b"{},", b"]}")),
        "long empty messages": (chats, _filled(size, chat, b"{" + b" " * 80 + b"},", b"]}")),
        "messages of nothing": (chats, _filled(size, chat, b'{"role":[]},', b"]}")),
        "parts of nothing": (chats, _filled(size, chat + b'{"role":"user","content":[', b"[],", b"]}]}")),
        "numbers for stops": (completions, _filled(size, text + b'"stop":[', b"0              ,", b"]}")),
        "negative stop ids": (completions, _filled(size, text + b'"stop_token_ids":[', b"-100000,        ", b"]}")),
        "biases": (completions, text + b'"logit_bias":{' + names + b"}}"),
        "unknown fields": (completions, text + names + b"}"),
        "mixed prompts": (completions, _filled(size, b'{"model":"tiny","prompt":[', b'"a",1234567,', b"]}")),
        "an unknown name": (completions, text + b'"' + b"a" * size + b'":1}'),
        "nested lists": (completions, text + b'"stop":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"),
        "a long number": (completions, text + b'"seed":' + b"1" * size + b"}"),
        "no end": (completions, text + b'"user":"' + b"\\\"" * (size // 2)),
    }  # fmt: skip
