#!/usr/bin/env python3
"""Show that diffusers loads a LoRA of ours and computes with it what we compute.

    python3 scripts/load_lora_diffusers.py MODEL_DIR LORA.safetensors [--trainer target/release/serenity-trainer]

MODEL_DIR is a folder with transformer/, LORA a file that serenity-launch (or `serenity-trainer parity lora-step --lora`) wrote for that
model. The LoRA goes three ways through diffusers: `Flux2Pipeline.lora_state_dict`, `load_lora_adapter` into the transformer, and merged
into its weights (`fuse_lora`). Prediction with the adapter and with the merged weights are compared with ours, which
`serenity-trainer parity lora-step` computes from the same random sample. Needs torch, diffusers, peft. Exit status 0 if they agree
to 1e-5 (relative, float32) and the LoRA changes the prediction at all, 1 otherwise.
"""
import argparse
import json
import subprocess
import sys
import tempfile

import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

HEIGHT, WIDTH, TEXT, GUIDANCE = 3, 5, 9, 2.5


def our_prediction(args, state, metadata, sample):
    """The prediction of `serenity-trainer` for a case whose initial adapters are those of the file."""
    case = {**sample, **{f"init.{k.removeprefix('transformer.')}": v.float() for k, v in state.items()}}
    optimizer = {"name": "adamw", "lr": 0.0, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
    described = {"optimizer": json.dumps(optimizer), "rank": str(metadata["transformer.r"]), "alpha": str(metadata["transformer.lora_alpha"]),
                 "guidance": str(GUIDANCE), "height": str(HEIGHT), "width": str(WIDTH)}
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in case.items()}, f"{folder}/case.safetensors", described)
        subprocess.run([args.trainer, "parity", "lora-step", "--model", args.model, "--case", f"{folder}/case.safetensors",
                        "--out", f"{folder}/out.safetensors"], check=True)
        return load_file(f"{folder}/out.safetensors")["pred"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("lora")
    parser.add_argument("--trainer", default="target/release/serenity-trainer")
    args = parser.parse_args()
    with safe_open(args.lora, "pt") as f:
        described, keys = json.loads(f.metadata()["lora_adapter_metadata"]), set(f.keys())

    state, metadata = Flux2Pipeline.lora_state_dict(args.lora, return_lora_metadata=True)
    assert set(state) == keys, "the pipeline reads other keys than the file has"
    assert metadata == described, "the pipeline reads other metadata than the file has"
    print(f"Flux2Pipeline.lora_state_dict: {len(state)} tensors, r {metadata['transformer.r']}, alpha {metadata['transformer.lora_alpha']}")

    transformer = Flux2Transformer2DModel.from_pretrained(args.model, subfolder="transformer", torch_dtype=torch.float32).eval()
    config, generator = transformer.config, torch.Generator().manual_seed(1)
    draw = lambda tokens, features: torch.randn(2, tokens, features, generator=generator)
    sample = {"x0": draw(HEIGHT * WIDTH, config.in_channels), "noise": draw(HEIGHT * WIDTH, config.in_channels),
              "ctx": draw(TEXT, config.joint_attention_dim), "sigma": torch.tensor([0.3, 0.85])}
    sigma = sample["sigma"][:, None, None]

    def predict():
        with torch.no_grad():
            return transformer(
                hidden_states=(1 - sigma) * sample["x0"] + sigma * sample["noise"],
                encoder_hidden_states=sample["ctx"],
                timestep=sample["sigma"],
                guidance=torch.full((2,), GUIDANCE),
                img_ids=torch.tensor([[0.0, i, j, 0] for i in range(HEIGHT) for j in range(WIDTH)]),
                txt_ids=torch.tensor([[0.0, 0, 0, i] for i in range(TEXT)]),
                return_dict=False,
            )[0]

    ours, without = our_prediction(args, state, metadata, sample), predict()
    transformer.load_lora_adapter(state, prefix="transformer", metadata=metadata, adapter_name="serenity")
    loaded = {"transformer." + n.replace(".serenity", "") for n, _ in transformer.named_parameters() if "lora_" in n}
    assert loaded == keys, "diffusers put adapters on other linears than the file names"
    with_adapter = predict()
    transformer.fuse_lora()
    transformer.unload_lora()
    merged = predict()
    difference = lambda x: ((x - ours).norm() / ours.norm()).item()
    print(f"relative difference to our prediction: without the LoRA {difference(without):.1e}, with it {difference(with_adapter):.1e}, "
          f"merged {difference(merged):.1e}")
    if max(difference(with_adapter), difference(merged)) > 1e-5 or difference(without) < 1e-4:
        sys.exit("FAILED: diffusers computes something else with this LoRA")


if __name__ == "__main__":
    main()
