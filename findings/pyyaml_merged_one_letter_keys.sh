#!/usr/bin/env bash
# PyYAML 6.0.4: in a chain of merge keys, as configs of experiments have them (base, variant, run), an override in the middle
# is lost if its key has one letter, such as LoRA's `r`. The same override with a longer key, such as `rank`, is kept.
# The loader drops a key that it has merged before by the identity of the string object, and CPython has one object for
# each string of one Latin-1 character, while longer keys are read into an object each. PyYAML 6.0.3 keeps both.
# Expected output: "6.0.3: r 16, rank 16" and "6.0.4: r 4, rank 16"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/config.yaml" <<'YAML'
base: &base {r: 4, rank: 4, lr: 0.001}
large: &large {<<: *base, r: 16, rank: 16}
run: {<<: *large, lr: 0.01}
YAML
cat > "$dir/read.py" <<'PY'
import sys

import yaml

large, run = (yaml.safe_load(open(sys.argv[1]))[name] for name in ("large", "run"))
assert (large["r"], large["rank"], run["lr"]) == (16, 16, 0.01)
print(f"{yaml.__version__}: r {run['r']}, rank {run['rank']}")
PY
for version in 6.0.3 6.0.4; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install --quiet "pyyaml==$version"
    "$dir/$version/bin/python" "$dir/read.py" "$dir/config.yaml"
done | tee "$dir/output"
diff "$dir/output" - <<'EXPECTED'
6.0.3: r 16, rank 16
6.0.4: r 4, rank 16
EXPECTED
