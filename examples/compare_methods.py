"""Compare two methods from Python and read the results. The same as `petune compare linear adaptformer …`.

python examples/compare_methods.py
"""

import petune

comparison = petune.compare(
    methods=["linear", "adaptformer:bottleneck=16"],
    seeds=[0, 1],
    run={
        "backbone": "vit_nano",  # comes with petune, works offline
        "dataset": "digits",
        "image_size": 16,  # small and few, so that this takes seconds
        "shots": 5,
        "train": {"epochs": 1, "batch_size": 10},
    },
    output="runs/two-methods",  # rerun to resume; finished runs are skipped
)

for row in comparison.rows:
    if row.status == "failed":
        print(f"{row.method} failed: {row.reason}")
    else:
        print(
            f"{row.method}: {row.mean['top1']:.1f} ± {row.std['top1']:.1f} % top-1 with {row.tuned:,} tuned parameters"
        )
print(f"table and figure: {comparison.output}/compare.md, compare.svg")
