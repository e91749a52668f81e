#!/usr/bin/env bash
# Everything that needs a GPU: correctness of every kernel and tile, tuning, peers.
# usage: benchmarks/gpu.sh [correctness|tune|peers|all ...]   (default: all, one after the other)
# Results are JSON with device, driver and versions, in benchmarks/results; the tuned table goes to triton_attn/tables.
# OUT=folder puts the results elsewhere too; WHEELS=folder holds wheels of what may be missing.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

[ $# -gt 0 ] || set -- all
steps=""
for step in "$@"; do
  case $step in
    all) steps="$steps correctness tune peers" ;;
    correctness | tune | peers) steps="$steps $step" ;;
    *) echo "step is '$step'; allowed: correctness, tune, peers, all" >&2; exit 2 ;;
  esac
done

missing() {
  "$python" - <<'CHECK'
from importlib.metadata import PackageNotFoundError, version

needs = {"torch": (2, 11), "triton": (3, 6), "einops": (0,), "hypothesis": (0,), "pytest": (0,)}
for name, least in needs.items():
    try:
        found = tuple(int(part) for part in version(name).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        print(name)
    else:
        if found < least:
            print(f"{name}>={'.'.join(map(str, least))}")
CHECK
}

absent=$(missing)
if [ -n "$absent" ] && [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
  absent=$(missing)
fi
if [ -n "$absent" ]; then
  echo "missing: $(echo $absent); name a folder of wheels with WHEELS=folder" >&2
  exit 2
fi
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }

code=0
for step in $steps; do
  echo "== $step"
  "$python" benchmarks/on_gpu.py "$step" || code=$?
done
if [ -n "${OUT:-}" ]; then cp benchmarks/results/*.json triton_attn/tables/*.json "$OUT"; fi
exit "$code"
