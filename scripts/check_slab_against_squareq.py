#!/usr/bin/env python3
"""Compare slabs of `serenity-slab build` with the original SquareQ v2 builder, tensor by tensor and field by field.

    python3 scripts/check_slab_against_squareq.py SERENITY_SLAB MODEL... [--squareq DIR] [--pack-k 64]

SERENITY_SLAB is the executable, MODEL a folder with transformer/ in the diffusers layout, DIR the folder `src` of a checkout of the
original (github.com/CodeAlexx/SquareQ). Needs torch, diffusers, safetensors and numpy. For each model the original builder quantises the
transformer as diffusers loads it, we build from the files, and these must agree: the bytes of every quantised tensor, the manifest without
our additions (values, types, order of fields), and the verdict of the original reader and of its validation on our files, which
must be none. Without --squareq a numpy implementation of the published rule stands in for the builder, and the reader is not run.
Exit status 0 if everything holds, 1 otherwise.
"""
import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def quantise(weight, pack_k):
    """Rows of float32 to int8: scale = max(|row|) / 127, at least 1e-8; code = round half even (w * (1 / scale)), at most 127."""
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    rows, columns = weight.shape
    padded = -(-columns // pack_k) * pack_k if pack_k > 1 else columns
    scale = np.maximum(np.abs(weight).max(axis=1) / np.float32(127), np.float32(1e-8)).astype(np.float32)
    codes = np.zeros((rows, padded), np.int8)
    codes[:, :columns] = np.clip(np.rint(weight * (np.float32(1) / scale)[:, None]), -127, 127).astype(np.int8)
    return codes, scale


def with_numpy(model, pack_k):
    """The tensors that the published rule gives for every linear of the model."""
    import torch
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            codes, scale = quantise(module.weight.detach().float().numpy(), pack_k)
            tensors |= {f"{name}.qweight": codes, f"{name}.scale": scale, f"{name}.zero_point": np.zeros_like(scale)}
    return tensors


def check(args, folder):
    from diffusers import Flux2Transformer2DModel
    problems = []
    model = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    with tempfile.TemporaryDirectory() as temp:
        ours, theirs = Path(temp, "ours"), Path(temp, "theirs")
        subprocess.run([args.serenity_slab, "build", "--model", folder, "--output", str(ours), "--pack-k", str(args.pack_k)], check=True,
                       stdout=subprocess.DEVNULL)
        built = load_file(f"{ours}.safetensors")
        manifest = json.loads(Path(f"{ours}.manifest.json").read_text())
        if manifest.pop("serenity", None) is None:
            problems.append("our manifest lacks our additions")
        expected = with_numpy(model, args.pack_k)
        sources = {"the published rule": expected}
        if args.squareq:
            from squareq.builder import build_safetensors_slab
            from squareq.manifest import load_and_validate_manifest, validate_manifest_against_safetensors
            with contextlib.redirect_stdout(io.StringIO()):
                build_safetensors_slab(model=model, output_dir=temp, slab_name="theirs", architecture_id=manifest["architecture_id"],
                                       pack_k=args.pack_k)
            sources["the original builder"] = load_file(f"{theirs}.safetensors")
            original = json.loads(Path(f"{theirs}.manifest.json").read_text())
            if json.dumps(original) != json.dumps(manifest):
                problems.append("the manifests differ")
            load_and_validate_manifest(f"{ours}.manifest.json", model=model)
            problems += validate_manifest_against_safetensors(f"{ours}.manifest.json", f"{ours}.safetensors")
        for source, tensors in sources.items():
            for name in sorted(set(tensors) | {n for n in built if not n.startswith("__pad__.")}):
                x, y = built.get(name), tensors.get(name)
                if x is None or y is None:
                    problems.append(f"{name}: only in {source if x is None else 'ours'}")
                elif x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
                    problems.append(f"{name}: differs from {source}")
        padded = sum(layer["orig_shape"] != layer["packed_shape"] for layer in manifest["layers"])
        print(f"{folder}: {manifest['layer_count']} layers ({padded} of them padded), {len(expected)} tensors, compared with "
              f"{' and '.join(sources)}: {'equal' if not problems else 'DIFFERENT'}")
    return [f"{folder}: {p}" for p in problems]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("serenity_slab")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--squareq")
    parser.add_argument("--pack-k", type=int, default=64)
    args = parser.parse_args()
    if args.squareq:
        sys.path.insert(0, args.squareq)
    problems = [p for folder in args.models for p in check(args, folder)]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
