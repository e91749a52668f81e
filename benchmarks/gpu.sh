#!/usr/bin/env bash
# Everything that needs a GPU: correctness of every kernel and tile, tuning, peers.
# usage: benchmarks/gpu.sh [correctness|tune|peers|all ...]   (default: all, one after the other)
# Results go to the folder OUT, by default ./out: JSON with device, driver and versions, the tuned table, and gpu.log.
# No part begins anything new after PART seconds (360). A part that was killed or had no time for everything goes on where it was
# when the same command is given again with the same folder; remove the folder to begin anew.
# WHEELS=folder holds wheels of what may be missing. Ends with 0 if all is right, 1 if something is wrong, 4 if something is left to do.
set -eu -o pipefail
case ${OUT:=out} in /*) out=$OUT ;; *) out=$PWD/$OUT ;; esac
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3} part=${PART:-360}

[ $# -gt 0 ] || set -- all
steps=""
for step in "$@"; do
  case $step in
    all) steps="$steps correctness tune peers" ;;
    correctness | tune | peers) steps="$steps $step" ;;
    *) echo "step is '$step'; allowed: correctness, tune, peers, all" >&2; exit 2 ;;
  esac
done
case $part in '' | *[!0-9]*) echo "PART is '$part'; allowed: whole seconds" >&2; exit 2 ;; esac

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

mkdir -p "$out"
# calls take the tuned tiles, once there are any
export TRITON_ATTN_TILES="$out"
code=0
for step in $steps; do
  echo "== $step" | tee -a "$out/gpu.log"
  begun=$SECONDS
  while :; do
    ended=0
    left=$((part - SECONDS + begun))
    "$python" benchmarks/on_gpu.py "$step" --out "$out" --seconds "$((left > 0 ? left : 0))" 2>&1 | tee -a "$out/gpu.log" || ended=$?
    # 3: the process has lost the GPU to a wrong access, which is noted; a new one goes on
    [ "$ended" -eq 3 ] && [ "$((SECONDS - begun))" -lt "$part" ] || break
  done
  [ "$ended" -eq 3 ] && ended=4
  if [ "$ended" -ne 0 ] && [ "$code" -ne 1 ]; then code=$ended; fi
done
exit "$code"
