#!/usr/bin/env python3
"""Compare the output of `serenity-trainer parity` (or `serenity-encoder parity`) with a reference file.

    python3 scripts/check_parity.py OUT.safetensors REFERENCE.safetensors [--tolerance 1e-5] [--gradients 1e-4]

Needs numpy and safetensors, no torch. Every tensor of OUT must be in REFERENCE with the same shape; tensors of REFERENCE that a
computation produces (not its inputs) must be in OUT. A difference is measured as |x - y| / |y| (Euclidean norm). Tensors named grad.*
and after3.* have the tolerance --gradients, `tokens` and `decoded` 2e-5 absolute, `embeds` 5e-5 absolute, all others --tolerance.
For after3.* also what three updates changed is compared (after3 - init), at 100 times the tolerance: AdamW divides by the gradient's
own size, which makes a change out of rounding where a gradient is nearly zero. Exit status 0 if everything holds, 1 otherwise.
"""
import argparse
import sys

import numpy as np
from safetensors.numpy import load_file

OUTPUTS = ("grad.", "after3.", "loss.", "grad_norm.", "double.", "single.")
OUTPUT_NAMES = ("temb", "output", "pred", "tokens", "decoded", "embeds")
ABSOLUTE = {"tokens": 2e-5, "decoded": 2e-5, "embeds": 5e-5}


def relative(x, y):
    scale = np.linalg.norm(y)
    return np.linalg.norm(x - y) / (scale if scale > 0 else 1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("reference")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--gradients", type=float, default=1e-4)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    ours, reference = load_file(args.out), load_file(args.reference)
    failures, worst, compared = [], {}, 0
    expected = {k for k in reference if k.startswith(OUTPUTS) or k in OUTPUT_NAMES}
    for name in sorted(expected - set(ours)):
        failures.append(f"{name}: not in the output")
    for name in sorted(ours):
        if name not in reference:
            failures.append(f"{name}: not in the reference")
            continue
        x, y = ours[name].astype(np.float64), reference[name].astype(np.float64)
        if x.shape != y.shape:
            failures.append(f"{name}: shape {x.shape}, expected {y.shape}")
            continue
        if name in ABSOLUTE:
            checks = [(name, np.abs(x - y).max(), ABSOLUTE[name])]
        else:
            tolerance = args.gradients if name.startswith(("grad.", "after3.")) else args.tolerance
            checks = [(name, relative(x, y), tolerance)]
            start = "init." + name.removeprefix("after3.")
            if name.startswith("after3.") and start in reference:
                init = reference[start].astype(np.float64)
                checks.append((name + " (change)", relative(x - init, y - init), 100 * args.gradients))
        for what, difference, tolerance in checks:
            kind = what.split(".")[0] + (" change" if "(change)" in what else "")
            worst[kind] = max(worst.get(kind, 0.0), difference)
            if args.verbose:
                largest = np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)
                print(f"{what}: {difference:.3e} (largest {largest:.3e})")
            if not difference <= tolerance:
                failures.append(f"{what}: {difference:.3e} > {tolerance:.0e}")
        compared += 1
    print(f"{compared} tensors compared; worst difference by kind: " + ", ".join(f"{k} {v:.1e}" for k, v in sorted(worst.items())))
    for failure in failures:
        print("FAILED", failure)
    if not compared:
        print("FAILED nothing was compared")
    return 1 if failures or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
