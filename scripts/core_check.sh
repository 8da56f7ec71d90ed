#!/bin/sh
# `pip install .` without extras: the command and the package work, and no torch is there.
set -eu
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${1:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -c constraints.txt .
cd "$venv"
bin/sp2dpo --help > help.txt
bin/python - <<'PY'
import importlib.util

import sp2dpo

assert importlib.util.find_spec("torch") is None, "torch is installed in the core environment"
print("core without torch:", sp2dpo.__version__, float(sp2dpo.schedule_beta([[[0.05, 0.06, 0.9]]])[0]))
PY
bin/python -c 'from sp2dpo.train import PairwiseDPOTrainer' 2> error.txt && exit 1
tail -n 1 error.txt | grep "pip install 'sp2dpo\[train\]'"
