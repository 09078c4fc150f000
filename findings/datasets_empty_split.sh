#!/usr/bin/env bash
# datasets 5.2.0: a DatasetDict of which one split was made empty by select([]) is written by save_to_disk without a word.
# One would expect load_from_disk to return it, as it does for a split that filter made empty (which is checked here, too).
# What happens: load_from_disk raises an IndexError that names neither the split nor the directory, and so the other
# splits of the DatasetDict cannot be read with it either; each of them loads from its own subdirectory.
# Expected output: "written: ['test', 'train']" and "read: IndexError: list index out of range"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
HF_HOME="$dir/home" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY' 2>"$dir/err" || { cat "$dir/err"; exit 1; }
import os

import datasets

assert datasets.__version__ == "5.2.0"
train = datasets.Dataset.from_dict({"label": [0, 1, 0]})
datasets.DatasetDict({"train": train, "test": train.select([])}).save_to_disk("saved")
print("written:", sorted(name for name in os.listdir("saved") if os.path.isdir(f"saved/{name}")))
assert len(datasets.load_from_disk("saved/train")) == 3
datasets.DatasetDict({"train": train, "test": train.filter(lambda row: row["label"] > 1)}).save_to_disk("filtered")
assert len(datasets.load_from_disk("filtered")["test"]) == 0
try:
    datasets.load_from_disk("saved")
except IndexError as error:
    print(f"read: IndexError: {error}")
else:
    raise SystemExit("it can be read now")
PY
