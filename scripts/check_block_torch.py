#!/usr/bin/env python3
"""Compare the gradients of one block with PyTorch's autograd in float32.

    serenity-trainer gpu-check block --dump FOLDER && python3 scripts/check_block_torch.py FOLDER

FOLDER has a double and a single block, each as NAME.json, NAME.payload (INT8 rows and scales) and NAME.safetensors (what the block saw:
input, conditioning, the gradient of its output; its adapters, and their gradients as the trainer computed them). This script computes the
block from its definition and lets autograd differentiate it, in float32 without TF32, on the GPU if there is one. For every adapter gradient
of a float32 block: relative error |x - y| / |y| at most --error and cosine at least --cosine. A gradient of a bf16 block may also differ by
as much as 1.5 times what PyTorch's own bf16 autograd of the same block does: those of q and k are small differences of large numbers.
Exit status 0 if all hold. Needs torch and numpy.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F


def tensors(path):
    data = np.memmap(path, np.uint8, "r")
    size = int(data[:8].view("<u8")[0])
    header = json.loads(data[8 : 8 + size].tobytes())
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "F32", name
        start, end = (8 + size + o for o in entry["data_offsets"])
        result[name] = torch.from_numpy(np.frombuffer(data[start:end].tobytes(), "<f4").reshape(entry["shape"]).copy())
    return result


class Block:
    def __init__(self, folder, name, device, dtype=torch.float32):
        self.dtype = dtype
        self.about = json.loads((folder / f"{name}.json").read_text())
        loaded = tensors(folder / f"{name}.safetensors")
        self.t = {k: v.to(device, dtype) for k, v in loaded.items() if not k.startswith("grad.")}
        self.expected = {k: v for k, v in loaded.items() if k.startswith("grad.")}
        payload = np.memmap(folder / f"{name}.payload", np.uint8, "r")
        self.weights = {}
        for part in self.about["parts"]:
            rows, cols, padded = part["rows"], part["cols"], part["padded"]
            codes = payload[part["codes"] : part["codes"] + rows * padded].view(np.int8).reshape(rows, padded)[:, :cols]
            scales = payload[part["scales"] : part["scales"] + 4 * rows].view("<f4")
            # As in training: the product in float32, rounded to bfloat16.
            matrix = torch.from_numpy(codes.copy()).to(device).float() * torch.from_numpy(scales.copy()).to(device)[:, None]
            self.weights[part["name"]] = matrix.bfloat16().to(dtype)
        self.adapters = {k: v.requires_grad_() for k, v in self.t.items() if k.startswith(("A.", "B."))}

    def linear(self, name, x):
        a, b = (self.adapters[f"{half}.{self.about['prefix']}{name}"] for half in "AB")
        return F.linear(x, self.weights[name]) + self.about["scale"] * F.linear(F.linear(x, a), b)

    def mod(self, name):
        return (self.t[f"{name}.{part}"].reshape(1, -1) for part in ("shift", "scale", "gate"))

    def norm(self, x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=self.about["eps"]) * (1 + scale) + shift

    def heads(self, x, norm=None):
        """[T, D] to [heads, T, head dim], normed over a head if wanted."""
        x = x.reshape(x.shape[0], self.about["heads"], -1).transpose(0, 1)
        if norm is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.about["eps"]) * self.t[f"norm.{norm}"]

    def rotated(self, x):
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], self.t["cos"], self.t["sin"]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    def attention(self, q, k, v):
        q, k = self.rotated(q), self.rotated(k)
        if self.dtype == torch.float32:
            scores = (q @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
            return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)

    def single(self, h):
        shift, scale, gate = self.mod("single")
        d, m = h.shape[-1], self.about["mlp"]
        p = self.linear("attn.to_qkv_mlp_proj", self.norm(h, shift, scale))
        q, k, v, g, u = p.split((d, d, d, m, m), -1)
        attended = self.attention(self.heads(q, "attn.norm_q"), self.heads(k, "attn.norm_k"), self.heads(v))
        return h + gate * self.linear("attn.to_out", torch.cat((attended, F.silu(g) * u), -1))

    def double(self, joint):
        text = self.about["text"]
        streams = {"text": joint[:text], "image": joint[text:]}
        names = {
            "image": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff", "attn.norm_q", "attn.norm_k"),
            "text": (
                "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff_context",
                "attn.norm_added_q", "attn.norm_added_k",
            ),
        }
        parts = []
        for stream in ("text", "image"):
            to_q, to_k, to_v, _, _, norm_q, norm_k = names[stream]
            shift, scale, _ = self.mod(f"{stream}.attention")
            n = self.norm(streams[stream], shift, scale)
            parts.append((self.heads(self.linear(to_q, n), norm_q), self.heads(self.linear(to_k, n), norm_k), self.heads(self.linear(to_v, n))))
        attended = self.attention(*(torch.cat(pair, 1) for pair in zip(*parts)))
        results = []
        for stream, a in (("text", attended[:text]), ("image", attended[text:])):
            _, _, _, out, ff, _, _ = names[stream]
            _, _, gate = self.mod(f"{stream}.attention")
            x = streams[stream] + gate * self.linear(out, a)
            shift, scale, gate = self.mod(f"{stream}.mlp")
            g, u = self.linear(f"{ff}.linear_in", self.norm(x, shift, scale)).chunk(2, -1)
            results.append(x + gate * self.linear(f"{ff}.linear_out", F.silu(g) * u))
        return torch.cat(results)

    def gradients(self):
        x = self.t["x"].flatten(0, -2)
        y = self.double(x) if self.about["kind"] == "double" else self.single(x)
        (y * self.t["dy"].flatten(0, -2)).sum().backward()
        return {f"grad.{name}": adapter.grad for name, adapter in self.adapters.items()}


def distance(x, y):
    """Relative error and cosine."""
    return ((x - y).norm() / y.norm()).item(), (torch.dot(x.flatten(), y.flatten()) / (x.norm() * y.norm())).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--error", type=float, default=1e-2)
    parser.add_argument("--cosine", type=float, default=0.9999)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    print(f"{'gradient':<74} {'norm':>10} {'error':>9} {'cosine':>11}  (float32 on {device})")
    failed = compared = 0
    for name in sorted(file.stem for file in args.folder.glob("*.json")):
        block = Block(args.folder, name, device)
        references = block.gradients()
        halves = {}
        if block.about["type"] == "bf16":
            halves = Block(args.folder, name, device, torch.bfloat16).gradients()
        for gradient, reference in sorted(references.items()):
            x, y = block.expected[gradient].double(), reference.cpu().double()
            error, cosine = distance(x, y)
            note, good = "", error <= args.error and cosine >= args.cosine
            if gradient in halves:
                own, _ = distance(halves[gradient].cpu().double(), y)
                note, good = f"PyTorch's bf16 {own:.2e}", good or error <= 1.5 * own
            # NaN fails both.
            good = good and y.norm().item() > 0
            failed += not good
            compared += 1
            print(f"{name + ' ' + gradient:<74} {y.norm().item():>10.3e} {error:>9.2e} {cosine:>11.8f} {'ok' if good else 'FAIL'} {note}")
        del block
    print(f"{compared} gradients, {failed} of them too far off")
    return 1 if failed or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
