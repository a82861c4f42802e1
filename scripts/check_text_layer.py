#!/usr/bin/env python3
"""One layer of the text encoder on random weights against the same layer of transformers, on this machine.

    scripts/check_text_layer.py --encoder target/release/serenity-encoder [--device cuda] [--small]

With --device cuda our bf16 is compared with transformers' bf16 on the same device at the real geometry (hidden 5120, 32 heads, 8 of keys,
feed-forward 32768); with --device cpu both compute in float32. --small takes a geometry for machines without the memory. Both are also
compared with transformers in float32, so that it shows whose error it is. Exit 0: ours differs by at most 1e-2 (relative norm; 1e-5 in
float32) from theirs, captions and pad alike. 1: more. 69: torch or transformers are missing, or there is no such device.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import MistralConfig
    from transformers.models.mistral import modeling_mistral as mistral
except ImportError as missing:
    print(f"error: {missing}", file=sys.stderr)
    sys.exit(69)

MAX_LENGTH = 512
LENGTHS = [1, 41, 140, 64, 65, 511]
PAD = 11


def make(folder, g, generator):
    """Random weights of layer 0 and embeddings; the configuration names a second layer, whose weights nothing reads."""
    hidden, q, kv = g["hidden_size"], g["num_attention_heads"] * g["head_dim"], g["num_key_value_heads"] * g["head_dim"]

    def matrix(out, inner, gain=1.0):
        return (torch.randn(out, inner, generator=generator) * gain * inner**-0.5).bfloat16()

    def norm():
        return (1 + 0.1 * torch.randn(hidden, generator=generator)).bfloat16()

    tensors = {
        "self_attn.q_proj": matrix(q, hidden, 2.0),
        "self_attn.k_proj": matrix(kv, hidden, 2.0),
        "self_attn.v_proj": matrix(kv, hidden),
        "self_attn.o_proj": matrix(hidden, q),
        "mlp.gate_proj": matrix(g["intermediate_size"], hidden),
        "mlp.up_proj": matrix(g["intermediate_size"], hidden),
        "mlp.down_proj": matrix(hidden, g["intermediate_size"]),
        "input_layernorm": norm(),
        "post_attention_layernorm": norm(),
    }
    table = torch.randn(g["vocab_size"], hidden, generator=generator).bfloat16()
    named = {f"model.layers.0.{name}.weight": tensor for name, tensor in tensors.items()}
    save_file({**named, "model.embed_tokens.weight": table}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**g, "rope_parameters": {"rope_theta": 1e9, "rope_type": "default"}, "rope_theta": 1e9}))
    return tensors, table


def theirs(tensors, table, g, captions, device, dtype):
    """The layer's output for every caption's tokens at the end of the padded caption, and for a pad, which attends to nothing."""
    keys = {k: v for k, v in g.items() if k not in ("hidden_act",)}
    config = MistralConfig(**keys, sliding_window=None, attention_dropout=0.0, rope_parameters={"rope_theta": 1e9, "rope_type": "default"})
    config._attn_implementation = "sdpa"
    layer = mistral.MistralDecoderLayer(config, 0).to(dtype).to(device).eval()
    state = {f"{name}.weight": tensor.to(dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(state)
    rotary = mistral.MistralRotaryEmbedding(config).to(device)
    outputs = []
    with torch.no_grad():
        for ids in captions:
            h = table[torch.tensor(ids)].to(dtype).to(device)[None]
            n = len(ids)
            positions = torch.arange(MAX_LENGTH - n, MAX_LENGTH, device=device)[None]
            mask = torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None]
            out = layer(h, attention_mask=mask, position_ids=positions, position_embeddings=rotary(h, positions), use_cache=False)
            outputs.append((out[0] if isinstance(out, tuple) else out).reshape(n, -1).float().cpu())
        pad = table[PAD].to(dtype).to(device)[None]
        pad = (pad + layer.mlp(layer.post_attention_layernorm(pad))).float().cpu()
    return torch.cat(outputs), pad


def ours(encoder, folder, captions, device, dtype):
    case, out = folder / "case.json", folder / "out.safetensors"
    case.write_text(json.dumps({"captions": captions, "pad_id": PAD, "max_length": MAX_LENGTH, "hidden_state_indices": [0, 1, 1]}))
    command = [encoder, "parity", "ids", "--model", str(folder), "--case", str(case), "--out", str(out), "--device", device, "--dtype", dtype]
    subprocess.run(command, check=True)
    result = load_file(out)
    hidden = result["rows"].shape[1] // 3
    return result["rows"][:, hidden : 2 * hidden], result["pad"][:, hidden : 2 * hidden], result["rows"][:, :hidden]


def error(x, y):
    return ((x - y).norm() / y.norm()).item()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--encoder", required=True)
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--small", action="store_true")
    options = arguments.parse_args()
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        sys.exit(69)
    torch.backends.cuda.matmul.allow_tf32 = False
    g = dict(hidden_size=5120, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=32768)
    if options.small:
        g = dict(hidden_size=192, num_attention_heads=6, num_key_value_heads=2, head_dim=48, intermediate_size=320)
    g |= dict(num_hidden_layers=2, vocab_size=2048, rms_norm_eps=1e-5, hidden_act="silu")
    generator = torch.Generator().manual_seed(5)
    captions = [torch.randint(0, g["vocab_size"], (n,), generator=generator).tolist() for n in LENGTHS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors, table = make(folder, g, generator)
        dtype = ("bf16", torch.bfloat16) if cuda else ("f32", torch.float32)
        rows, pad, embedded = ours(options.encoder, folder, captions, options.device, dtype[0])
    limit = 1e-2 if cuda else 1e-5
    exact = error(embedded, torch.cat([table[torch.tensor(ids)] for ids in captions]).float()) == 0.0
    print(f"{'ok' if exact else 'FAIL'}   embeddings equal")
    reference = theirs(tensors, table, g, captions, options.device, dtype[1])
    single = theirs(tensors, table, g, captions, options.device, torch.float32)
    ok = exact
    for what, mine, there, true in (("captions", rows, reference[0], single[0]), ("pad", pad, reference[1], single[1])):
        difference = error(mine, there)
        added = error(mine, true)
        # Written so that NaN fails.
        good = difference <= limit
        ok = ok and good
        print(
            f"{'ok' if good else 'FAIL'}   {what}: ours {dtype[0]} against transformers {dtype[0]} {difference:.2e} (limit {limit:.0e}); "
            f"against its float32: ours {added:.2e}, theirs {error(there, true):.2e}"
        )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
