#!/usr/bin/env bash
# datasets 5.2.0 reads a folder with train.parquet and test.parquet whose ClassLabel columns list the same names in
# another order. Each file is valid and says in its own metadata what its integers mean. One would expect an error, or
# integers that are mapped by name. What happens: the names of the first file are used for both, the integers of the
# second file stay as they are, and nothing is said. Every test label changes its meaning: here a test set of two cats
# and one dog is read as two dogs and one cat. `load_from_disk` of a DatasetDict keeps the names of each split.
# Expected output: "test.parquet says cat cat dog, load_dataset says dog dog cat"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$dir"
HF_HOME="$dir/home" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY' 2>"$dir/err" || { cat "$dir/err"; exit 1; }
import datasets

assert datasets.__version__ == "5.2.0"


def write(part, names, labels):
    features = datasets.Features({"x": datasets.Value("int64"), "label": datasets.ClassLabel(names=names)})
    rows = {"x": list(range(len(labels))), "label": [names.index(label) for label in labels]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(f"data/{part}.parquet")


write("train", ["cat", "dog"], ["cat", "dog", "cat"])
write("test", ["dog", "cat"], ["cat", "cat", "dog"])
alone = datasets.Dataset.from_parquet("data/test.parquet")
together = datasets.load_dataset("data")["test"]
names = [[split.features["label"].int2str(value) for value in split["label"]] for split in (alone, together)]
print(f"test.parquet says {' '.join(names[0])}, load_dataset says {' '.join(names[1])}")
assert names == [["cat", "cat", "dog"], ["dog", "dog", "cat"]]
PY
