#!/usr/bin/env python3
"""The VAE of serenity-encoder against PyTorch at FLUX.2's full size: values, and the time of the encoder in float32.

  target/release/serenity-encoder synth --only vae --output OUT/model
  python3 scripts/check_vae_torch.py OUT --encoder target/release/serenity-encoder [--device cuda] [--resolution 512] [--batch 4]

Makes a case of random images, lets `serenity-encoder parity vae` compute it on the device, and compares with the same network written down here in
PyTorch: in float64 (values), in float32 without TF32 (values and time). Needs torch and numpy; everything else is in this file.
Exit 0: the values agree (largest difference over largest magnitude below 5e-5). 1: they do not.
"""
import argparse, json, struct, subprocess, sys, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def read(path):
    data = Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + size])
    head.pop("__metadata__", None)
    body = data[8 + size :]
    return {n: torch.from_numpy(np.frombuffer(body[slice(*t["data_offsets"])], dtype="<f4").reshape(t["shape"]).copy()) for n, t in head.items()}


def write_case(path, image):
    body = image.tobytes()
    head = json.dumps({"image_u8_nchw": {"dtype": "U8", "shape": list(image.shape), "data_offsets": [0, len(body)]}}).encode()
    Path(path).write_bytes(struct.pack("<Q", len(head)) + head + body)


class Vae:
    def __init__(self, weights, dtype, device):
        self.w = {n: t.to(device, dtype) for n, t in weights.items()}

    def conv(self, x, name, **kw):
        return F.conv2d(x, self.w[name + ".weight"], self.w[name + ".bias"], **kw)

    def norm(self, x, name):
        return F.group_norm(x, 32, self.w[name + ".weight"], self.w[name + ".bias"], 1e-6)

    def resnet(self, x, name):
        h = self.conv(F.silu(self.norm(x, name + ".norm1")), name + ".conv1", padding=1)
        h = self.conv(F.silu(self.norm(h, name + ".norm2")), name + ".conv2", padding=1)
        return h + (self.conv(x, name + ".conv_shortcut") if name + ".conv_shortcut.weight" in self.w else x)

    def attention(self, x, name):
        b, c, h, w = x.shape
        t = self.norm(x, name + ".group_norm").flatten(2).transpose(1, 2)
        q, k, v = (F.linear(t, self.w[f"{name}.{p}.weight"], self.w[f"{name}.{p}.bias"]) for p in ("to_q", "to_k", "to_v"))
        a = torch.softmax(q @ k.transpose(1, 2) * c**-0.5, -1) @ v
        return x + F.linear(a, self.w[name + ".to_out.0.weight"], self.w[name + ".to_out.0.bias"]).transpose(1, 2).reshape(b, c, h, w)

    def middle(self, x, half):
        x = self.resnet(x, half + ".mid_block.resnets.0")
        return self.resnet(self.attention(x, half + ".mid_block.attentions.0"), half + ".mid_block.resnets.1")

    def encode(self, x):
        x = self.conv(x, "encoder.conv_in", padding=1)
        for i in range(4):
            for j in range(2):
                x = self.resnet(x, f"encoder.down_blocks.{i}.resnets.{j}")
            if i < 3:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down_blocks.{i}.downsamplers.0.conv", stride=2)
        x = F.silu(self.norm(self.middle(x, "encoder"), "encoder.conv_norm_out"))
        return self.conv(self.conv(x, "encoder.conv_out", padding=1), "quant_conv")[:, :32]

    def decode(self, x):
        x = self.middle(self.conv(self.conv(x, "post_quant_conv"), "decoder.conv_in", padding=1), "decoder")
        for i in range(4):
            for j in range(3):
                x = self.resnet(x, f"decoder.up_blocks.{i}.resnets.{j}")
            if i < 3:
                x = self.conv(F.interpolate(x, scale_factor=2), f"decoder.up_blocks.{i}.upsamplers.0.conv", padding=1)
        return self.conv(F.silu(self.norm(x, "decoder.conv_norm_out")), "decoder.conv_out", padding=1)


def difference(found, expected):
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max()), float((found - expected).norm() / expected.norm())


@torch.no_grad()
def main():
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("--encoder", default="target/release/serenity-encoder")
    p.add_argument("--device", default="cuda")
    p.add_argument("--resolution", type=int, default=512)
    p.add_argument("--batch", type=int, default=4)
    a = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    weights = read(a.out / "model/vae/diffusion_pytorch_model.safetensors")
    image = np.random.default_rng(1).integers(0, 256, (1, 3, 192, 256), dtype=np.uint8)
    write_case(a.out / "case.safetensors", image)
    command = [a.encoder, "parity", "vae", "--model", a.out / "model", "--case", a.out / "case.safetensors", "--out", a.out / "result.safetensors"]
    subprocess.run([*map(str, command), "--device", a.device], check=True)
    ours = read(a.out / "result.safetensors")
    pixels = torch.from_numpy(image).to(a.device).double() / 127.5 - 1
    failed = False
    for dtype in (torch.float64, torch.float32):
        vae = Vae(weights, dtype, a.device)
        latent = vae.encode(pixels.to(dtype))
        decoded = vae.decode(ours["latent_mode"].to(a.device, dtype))
        for name, theirs in (("latent_mode", latent), ("decoded", decoded)):
            worst, norm = difference(ours[name], theirs)
            failed |= not worst < 5e-5
            print(f"{name:12} against PyTorch {str(dtype)[6:]}: max {worst:.1e}, norm {norm:.1e}")
    images = torch.rand(a.batch, 3, a.resolution, a.resolution, device=a.device) * 2 - 1
    for layout in (torch.contiguous_format, torch.channels_last):
        vae.w = {n: t.to(memory_format=layout) if t.dim() == 4 else t for n, t in vae.w.items()}
        x = images.to(memory_format=layout)
        sync = torch.cuda.synchronize if a.device.startswith("cuda") else lambda: None
        for _ in range(2):
            vae.encode(x)
        sync()
        start, runs = time.time(), 5
        for _ in range(runs):
            vae.encode(x)
        sync()
        print(f"PyTorch {torch.__version__} float32 {str(layout)[6:]}: {a.batch * runs / (time.time() - start):.2f} images/s of {a.resolution} px")
    sys.exit(1 if failed else 0)


main()
