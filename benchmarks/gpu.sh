#!/usr/bin/env bash
# Checks training on a machine with a CUDA GPU and times it beside TRL: one call from a fresh clone, ten minutes at most.
#
#     bash benchmarks/gpu.sh [--out FOLDER] [--wheels FOLDER] [--cpu] [--only CHECK ...]
#
# gpu.json and gpu.md are written to FOLDER: by default $OUT, or runs/gpu. The Python is $PYTHON, that of .venv, or python3;
# its packages are used as they are. What is missing is put into a temporary folder beside them, from a folder of wheels or
# from the package index. Nothing else is downloaded, no model. --cpu: a rehearsal with tiny models and no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-runs/gpu} wheels='' checks=() cpu=''
while (($#)); do
  case $1 in
    --out) out=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    *) [[ $1 == --cpu ]] && cpu=yes; checks+=("$1"); shift ;;
  esac
done

python=''
for one in "${PYTHON:-}" .venv/bin/python python3 python; do
  if [[ $one ]] && "$one" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(command -v "$one")
    "$one" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null && break
    [[ $cpu || $one == "${PYTHON:-}" ]] && break
  fi
done
[[ $python ]] || { echo "gpu.sh: Python 3.11 or newer is needed; name it: PYTHON=python3.12 bash benchmarks/gpu.sh" >&2; exit 2; }

missing() {  # requirements of the project that this Python does not meet
  "$1" - <<'END'
import tomllib
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
    need = Requirement(line)
    try:
        met = need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        met = False
    if not met:
        print(line)
END
}

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

beside() {  # a Python that has the packages of another, and can get more
  "$python" -m venv --without-pip "$place"
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    > "$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
  python=$place/bin/python
}

get() {
  local from=(--timeout 15 --retries 1)
  [[ $wheels ]] && from=(--no-index --find-links "$wheels")
  timeout 240 "$python" -m pip install --quiet --disable-pip-version-check --no-input "${from[@]}" "$@"
}

mapfile -t needs < <(missing "$python")
optional=()
if [[ ! $cpu ]]; then
  for name in bitsandbytes deepspeed; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$name') is None)" || optional+=("$name")
  done
fi
if ((${#needs[@]} + ${#optional[@]})); then
  echo "gpu.sh: getting ${needs[*]} ${optional[*]}"
  beside
  if ((${#needs[@]})) && ! get "${needs[@]}"; then
    echo "gpu.sh: neither a package index nor --wheels gave what is missing: ${needs[*]}" >&2
    echo "Elsewhere: pip download --no-deps -d wheels NAME ...; then here: bash benchmarks/gpu.sh --wheels wheels" >&2
    exit 2
  fi
  for name in "${optional[@]}"; do
    get "$name" || echo "gpu.sh: no $name; its checks are skipped"
  done
fi

known() {  # sp2dpo by its name and version: manifests state them, and building a package would need more packages
  local version
  version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
  mkdir -p "$place/known/sp2dpo-$version.dist-info"
  printf 'Metadata-Version: 2.1\nName: sp2dpo\nVersion: %s\n' "$version" > "$place/known/sp2dpo-$version.dist-info/METADATA"
}
known
export PYTHONPATH="$PWD/src:$PWD/benchmarks:$place/known${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
"$python" benchmarks/gpu_checks.py --out "$out" "${checks[@]}"
