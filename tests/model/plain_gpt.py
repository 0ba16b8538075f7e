"""A GPT in plain PyTorch, the oracle of the tests; it shares only the weights, by name, with the package."""

from __future__ import annotations

import torch


def norm(x, w, name, kind, eps=1e-5):
    if kind == "RMSNorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def starts_of(window, gpt):
    """For each token the first token of its document, without resets that of the window: [seq] ints, by hand."""
    starts, start = [], 0
    for place in range(len(window)):
        if place and window[place - 1] == gpt.eod:
            start = place
        starts.append(start)
    return starts


def rope(x, base, positions):
    """x: [seq, width]; channel i turns with channel i + width / 2."""
    width = x.shape[1]
    out = torch.empty_like(x)
    for i in range(width // 2):
        angle = positions.to(x.dtype) * base ** (-2 * i / width)
        a, b = x[:, i], x[:, i + width // 2]
        out[:, i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[:, i + width // 2] = b * torch.cos(angle) + a * torch.sin(angle)
    return out


def positions_of(window, gpt):
    places = torch.arange(len(window))
    return places - torch.tensor(starts_of(window, gpt)) if gpt.reset_position_ids else places


def hash32(x):
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) % 2**32
    return (x >> 16) ^ x


def dropped(x, key, rate):
    """x: [places, channels]; each number is kept or not by a hash of key, place and channel, in a loop."""
    keep = [
        [hash32(hash32(key ^ hash32(p + 1)) ^ hash32(c + 2**24)) >= int(rate * 2**32) for c in range(x.shape[1])]
        for p in range(x.shape[0])
    ]
    return torch.where(torch.tensor(keep), x / (1 - rate), torch.zeros_like(x))


def attention(x, w, name, gpt, window, key=0, rate=0.0):
    """x: [seq, hidden], one window; heads in a loop, scores written out."""
    seq, width, groups = x.shape[0], gpt.kv_channels, gpt.num_query_groups
    per_group = gpt.num_attention_heads // groups
    qkv = linear(x, w, f"{name}.qkv").view(seq, groups, per_group + 2, width)
    mask = torch.triu(torch.full((seq, seq), float("-inf"), dtype=x.dtype), diagonal=1)
    if gpt.reset_attention_mask:
        for place, start in enumerate(starts_of(window, gpt)):
            mask[place, :start] = float("-inf")
    positions = positions_of(window, gpt)
    outputs = []
    for group in range(groups):
        keys, value = qkv[:, group, per_group], qkv[:, group, per_group + 1]
        if gpt.qk_layernorm:
            keys = norm(keys, w, f"{name}.k_norm", gpt.normalization)
        if gpt.position_embedding_type == "rope":
            keys = rope(keys, gpt.rotary_base, positions)
        for head in range(per_group):
            query = qkv[:, group, head]
            if gpt.qk_layernorm:
                query = norm(query, w, f"{name}.q_norm", gpt.normalization)
            if gpt.position_embedding_type == "rope":
                query = rope(query, gpt.rotary_base, positions)
            probabilities = torch.softmax(query @ keys.T / width**0.5 + mask, dim=-1)
            if rate:
                number = group * per_group + head
                probabilities = dropped(probabilities, hash32(hash32(key + 1) ^ hash32(number + 1)), rate)
            outputs.append(probabilities @ value)
    return linear(torch.cat(outputs, dim=-1), w, f"{name}.proj")


def mlp(x, w, name, gpt):
    x = linear(x, w, f"{name}.fc1")
    if gpt.swiglu:
        gate, up = x[:, : gpt.ffn_hidden_size], x[:, gpt.ffn_hidden_size :]
        return linear(gate * torch.sigmoid(gate) * up, w, f"{name}.fc2")
    if gpt.openai_gelu:
        gate = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    else:
        gate = torch.erf(x / 2**0.5)
    return linear(0.5 * x * (1 + gate), w, f"{name}.fc2")


def logits_of(w, gpt, tokens, dropout=(0.0, 0.0), keys=None):
    """[batch, seq, vocab] logits under the model's unsharded weights `w`; rates of attention's and hidden dropout."""
    logits = []
    for number, window in enumerate(tokens):
        x = w["embedding.weight"][window]
        if gpt.position_embedding_type == "learned_absolute":
            x = x + w["positions.weight"][positions_of(window, gpt)]
        for i in range(gpt.num_layers):
            p = f"layers.{i}"
            key = 0 if keys is None else hash32(int(keys[number]) ^ hash32(i + 1))

            def hidden(x, site, key=key):
                return dropped(x, hash32(key + site), dropout[1]) if dropout[1] else x

            x = hidden(x, 4) if i == 0 else x
            y = norm(x, w, f"{p}.attention_norm", gpt.normalization)
            x = x + hidden(attention(y, w, f"{p}.attention", gpt, window, key, dropout[0]), 2)
            x = x + hidden(mlp(norm(x, w, f"{p}.mlp_norm", gpt.normalization), w, f"{p}.mlp", gpt), 3)
        x = norm(x, w, "final_norm", gpt.normalization)
        logits.append(x @ w["embedding.weight" if gpt.tied_embeddings else "output.weight"].T)
    return torch.stack(logits)


def token_losses(w, gpt, tokens, targets, dropout=(0.0, 0.0), keys=None):
    """[batch, seq] next-token losses in nats under the model's unsharded weights `w`."""
    return (
        -torch.log_softmax(logits_of(w, gpt, tokens, dropout, keys), dim=-1)
        .gather(-1, targets.unsqueeze(-1))
        .squeeze(-1)
    )


def z_loss(w, gpt, tokens):
    """The mean over tokens of the squared logarithm of the sum of exponentials, written out."""
    logits = logits_of(w, gpt, tokens)
    largest = logits.max(dim=-1, keepdim=True).values.detach()
    return (largest.squeeze(-1) + (logits - largest).exp().sum(dim=-1).log()).square().mean()
