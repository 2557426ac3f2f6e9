"""The model, its adapters and its edit masks once more, in float64 NumPy: what the tests compare the library with.

Written from the papers and the contracts, one token or one head at a time where that is clearer, and sharing no
code with the library. Configurations and parameter trees are the library's; everything computed from them is not.
"""

import math

import numpy as np

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def f64(array):
    return np.asarray(array, np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# Edit masks.


def edit_mask(prompt_len, positions="prompt", groups=1, spans=(), generated=0):
    """Return bool ``[prompt_len + generated, 2]``, decided token by token."""
    mask = np.zeros((prompt_len + generated, 2), bool)
    for t in range(prompt_len):
        if any(start <= t < end for start, end in spans):
            continue
        if positions in ("prompt", "all"):
            mask[t, 0] = True
            continue
        first = last = 0
        for part in positions.split("+"):
            if part[0] == "f":
                first = int(part[1:])
            else:
                last = int(part[1:])
        half = prompt_len // 2
        if t < min(first, half):
            mask[t, 0] = True
        if t >= prompt_len - min(last, half):
            mask[t, groups - 1] = True
    for t in range(prompt_len, prompt_len + generated):
        mask[t, 0] = positions == "all"
    return mask


def last_place(tokens, marker):
    """Return where the last run of tokens equal to ``marker`` begins; None without one."""
    for start in range(len(tokens) - len(marker), -1, -1):
        if [int(token) for token in tokens[start : start + len(marker)]] == list(marker):
            return start
    return None


def adapter_mask(adapter, prompt_len, generated=0, spans=(), prompt=()):
    """Return the edit mask of a request with this adapter; ``spans`` are the earlier answers of its chat.

    ``prompt`` holds its tokens, for adapters with a marker.
    """
    if adapter is None:
        return np.zeros((prompt_len + generated, 2), bool)
    if adapter.config.kind == "prefix":
        return np.repeat([[True, False]], prompt_len + generated, axis=0)
    config = adapter.config
    if config.assistant_turns != "skip" or config.positions == "all":
        spans = ()
    mask = edit_mask(prompt_len, config.positions, 1 if config.share_weights else 2, spans, generated)
    if config.alora_invocation_tokens is not None:
        assert len(prompt) == prompt_len, "give the prompt's tokens"
        start = last_place(prompt, config.alora_invocation_tokens)
        mask[: len(mask) if start is None else start] = False
    return mask


# Adapters.


def orthonormal(rows):
    """Gram-Schmidt, one row after the other."""
    out = []
    for row in f64(rows):
        for _ in range(2):
            for done in out:
                row = row - (row @ done) * done
        out.append(row / np.sqrt(row @ row))
    return np.stack(out)


def _by_name(pattern, layer, site, default):
    path = f"model.layers.{layer}.{MODULES[site]}"
    for key, value in pattern.items():
        if key == site or path == key or path.endswith(f".{key}"):
            return value
    return default


def lora_scale(config, layer, site):
    rank = _by_name(config.rank_pattern, layer, site, config.rank)
    alpha = _by_name(config.alpha_pattern, layer, site, config.rank if config.alpha is None else config.alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def edited(adapter, layer, site, x, y, mask):
    """Return ``y [T, F]`` with the adapter's intervention on ``x [T, D]``, by the papers' equations."""
    leaves = adapter.params["layers"][layer].get(site)
    if leaves is None:
        return y
    config = adapter.config
    if config.kind == "lora":
        scale = lora_scale(config, layer, site)
        return y + mask[:, :1] * scale * ((x @ f64(leaves["lora_a"]).T) @ f64(leaves["lora_b"]).T)
    groups = 1 if config.share_weights else 2
    rank = leaves["w"].shape[0] // groups
    y = y.copy()
    for t, h in enumerate(x):
        for group in range(groups):
            if not mask[t, group]:
                continue
            own = slice(group * rank, (group + 1) * rank)
            w, b, r = f64(leaves["w"])[own], f64(leaves["b"])[own], f64(leaves["r"])[own]
            if config.kind == "loreft":
                r = orthonormal(r)
                y[t] += r.T @ (w @ h + b - r @ h)
            else:
                r = orthonormal(r) if config.orthonormal else r
                y[t] += r.T @ (w @ h + b)
    return y


def prefix_length(adapter):
    """Return how many learned positions stand in front of a prompt."""
    return adapter.config.rank if adapter.config.kind == "prefix" else 0


# The model.


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * f64(weight)


def frequencies(config):
    """Rotary frequencies; scaled by a factor, or as in Llama 3.1: kept, divided, or blended in between."""
    half = config.head_dim // 2
    freqs = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return np.array(freqs)
    if not hasattr(scaling, "low_freq_factor"):
        return np.array(freqs) / scaling.factor
    original = scaling.original_max_position_embeddings
    out = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < original / scaling.high_freq_factor:
            out.append(freq)
        elif wavelength > original / scaling.low_freq_factor:
            out.append(freq / scaling.factor)
        else:
            blend = (original / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            out.append((1 - blend) * freq / scaling.factor + blend * freq)
    return np.array(out)


def rotate(x, positions, freqs):
    """Rotate ``x [T, heads, C]``; channel i pairs with i + C / 2."""
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    for t, position in enumerate(positions):
        cos, sin = np.cos(position * freqs), np.sin(position * freqs)
        out[t, :, :half] = x[t, :, :half] * cos - x[t, :, half:] * sin
        out[t, :, half:] = x[t, :, half:] * cos + x[t, :, :half] * sin
    return out


def attention(q, k, v, scale, window=None):
    """Causal attention of ``q [T, H, C]`` over ``k, v [m + T, K, C]``; query head h reads KV head h // (H / K).

    All see the first m. With a ``window``, and m = 0, a query sees so many keys, the last of which is its own.
    """
    tokens, heads, _ = q.shape
    out = np.empty_like(q)
    for h in range(heads):
        kv = h // (heads // k.shape[1])
        scores = scale * q[:, h] @ k[:, kv].T
        own = scores[:, len(k) - tokens :]
        own[np.triu_indices(tokens, 1)] = -np.inf
        own[np.tril_indices(tokens, -(window or tokens))] = -np.inf
        out[:, h] = np.exp(log_softmax(scores)) @ v[:, kv]
    return out


def forward(config, params, tokens, adapter=None, mask=None):
    """Return float64 logits ``[T, V]`` of one sequence. ``mask`` is bool ``[T, 2]``, needed with an adapter."""
    logits, _ = forward_with_kv(config, params, tokens, adapter, mask)
    return logits


def forward_with_kv(config, params, tokens, adapter=None, mask=None):
    """``forward``, and for each layer its keys (rotated) and values, ``[T, K, C]`` each, behind those of a prefix."""
    tokens = np.asarray(tokens)
    length = 0 if adapter is None else prefix_length(adapter)
    positions = np.arange(length, length + len(tokens))
    freqs = frequencies(config)
    cache = []
    x = f64(params["embed"])[tokens]
    for i, w in enumerate(params["layers"]):

        def edit(site, value, into, layer=i):
            return into if adapter is None else edited(adapter, layer, site, value, into, mask)

        h = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
        qkv = {}
        for site in ("q", "k", "v"):
            y = h @ f64(w[site])
            if config.qkv_bias:
                y = y + f64(w[f"{site}_bias"])
            qkv[site] = edit(site, h, y).reshape(len(tokens), -1, config.head_dim)
        if config.qk_norm:
            for site in ("q", "k"):
                qkv[site] = rms_norm(qkv[site], w[f"{site}_norm"], config.rms_norm_eps)
        q, k = (rotate(qkv[site], positions, freqs) for site in ("q", "k"))
        v = qkv["v"]
        if length:
            front = adapter.params["layers"][i]["prefix"]
            k, v = (
                np.concatenate([f64(x).reshape(length, *y.shape[1:]), y]) for x, y in ((front["k"], k), (front["v"], v))
            )
        cache.append((k, v))
        mixed = attention(q, k, v, config.head_dim**-0.5, config.sliding_window).reshape(len(tokens), -1)
        x = x + edit("o", mixed, mixed @ f64(w["o"]))
        h = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
        gate, up = (edit(site, h, h @ f64(w[site])) for site in ("gate", "up"))
        h = gate / (1 + np.exp(-gate)) * up
        x = x + edit("down", h, h @ f64(w["down"]))
        x = edit("block", x, x)
    h = rms_norm(x, params["norm"], config.rms_norm_eps)
    head = f64(params["lm_head"]) if "lm_head" in params else f64(params["embed"]).T
    return h @ head, cache


def forced_log_probs(model, adapter, prompt, generated, spans=()):
    """Return the raw log-probability of each generated token given those before it, edits as the contracts say."""
    tokens = [*prompt, *generated]
    mask = adapter_mask(adapter, len(prompt), len(generated), spans)
    log_probs = log_softmax(forward(model.config, model.params, tokens, adapter, mask))
    return np.array([log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(generated)])


# Sampling.


def kept_tokens(logits, params):
    """Return the ids that top-k, then top-p of what is left, then min-p keep at a temperature, most likely first."""
    scaled = f64(logits) / params.temperature
    order = sorted(range(len(logits)), key=lambda token: (-scaled[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    probs = np.exp(log_softmax(scaled[order]))
    nucleus, mass = [], 0.0
    for token, prob in zip(order, probs, strict=True):
        if mass < params.top_p:
            nucleus.append((token, prob))
        mass += prob
    return [token for token, prob in nucleus if prob >= params.min_p * probs[0]]


def sampling_log_prob(logits, params, token):
    """Return the log-probability of a token under the distribution that it is drawn from; ``-inf`` if filtered."""
    allowed = kept_tokens(logits, params)
    if token not in allowed:
        return -np.inf
    return log_softmax(f64(logits)[allowed] / params.temperature)[allowed.index(token)]
