"""Survey every family of backbones × every method, and write docs/backbones.md from the results.

    python benchmarks/backbones.py                  # survey all, write results/backbones.json and docs/backbones.md
    python benchmarks/backbones.py --only beit      # some families, print only
    python benchmarks/backbones.py --all            # the places of every timm variant, on the meta device
"""

from __future__ import annotations

import argparse
import time

import torch

from survey.models import FAMILIES, build
from survey.pairs import enliven, examine


METHODS = ["linear", "full", "adaptformer", "vpt", "vpt:deep=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for family in FAMILIES:
        if args.only and not any(o in family for o in args.only):
            continue
        t = time.time()
        try:
            model = enliven(build(family))
        except Exception as e:
            print(f"{family:40s} BUILD {e}", flush=True)
            continue
        for method in args.methods:
            out = examine(model, method)
            print(f"{family:40s} {method:15s} {out.state:8s} {out.detail if out.state != 'ok' else ''} ", flush=True)
        print(f"   {time.time()-t:.1f}s", flush=True)


if __name__ == "__main__":
    main()
