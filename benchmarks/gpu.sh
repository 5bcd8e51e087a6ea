#!/usr/bin/env bash
# Everything that a GPU must prove, in one command and at most ten minutes, on a machine without a network that has
# Python 3.12 and a CUDA build of torch 2.11. Before, where there is a network:
#     python benchmarks/gpu_wheels.py collect .wheels [--reference]
# There, in a copy of this repository with that folder:
#     bash benchmarks/gpu.sh OUT
# OUT then holds summary.txt, log.txt, gpu.md and gpu.json, all written as it goes. docs/gpu.md says how to read them.
# `--dry-run` does the same on the CPU, in the present environment and at tiny shapes.
# Environment: PYTHON (python3), RXT_WHEELS (.wheels), RXT_SITE (/tmp/rxt-site, where wheels are unpacked), RXT_MINUTES
# (9.5 in all), RXT_TESTS (what of tests/cuda, as pytest's -k).
set -u -o pipefail
cd "$(dirname "$0")/.."

dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=yes; shift; fi
out="${1:?usage: bash benchmarks/gpu.sh [--dry-run] OUT}"
python="${PYTHON:-python3}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
summary="$out/summary.txt" log="$out/log.txt"
: > "$summary"
: > "$log"
ends=$(awk -v now="$(date +%s)" -v minutes="${RXT_MINUTES:-9.5}" 'BEGIN {print int(now + 60 * minutes)}')

left() { echo $((ends - $(date +%s))); }
say() { printf '%4d s left  %s\n' "$(left)" "$*" | tee -a "$summary" "$log"; }
# part NAME SECONDS COMMAND...: run a command for so many seconds at most, and say how it went.
part() {
    local name="$1" seconds="$2"
    shift 2
    if [ "$seconds" -lt 1 ]; then say "$name: SKIPPED, no time left"; return; fi
    printf '\n===== %s: %s\n' "$name" "$*" >> "$log"
    timeout --kill-after=10 "$seconds" "$@" >> "$log" 2>&1
    local code=$?
    if [ $code = 124 ]; then say "$name: FAILED, out of its $seconds s"
    elif [ $code = 0 ]; then say "$name: ok"
    else say "$name: FAILED, exit code $code"; fi
}

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
options=()
if [ -n "$dry" ]; then
    export RXT_CUDA_TESTS="${RXT_CUDA_TESTS:-cpu}" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    options=(--dry-run)
    # One process for all.
    files=(tests/cuda)
else
    site="${RXT_SITE:-/tmp/rxt-site}"
    rm -rf "$site" "$site-reference"
    export PYTHONPATH="$site:$PYTHONPATH" RXT_REFERENCE_SITE="$site-reference"
    part install 60 "$python" benchmarks/gpu_wheels.py install "${RXT_WHEELS:-.wheels}" --into "$site"
    # A process a file, so that an error that breaks the device ends no other file.
    files=(tests/cuda/test_*.py)
fi
tests="${RXT_TESTS:-}"
part torch 60 "$python" -c \
    'import sys, torch; print(sys.version, torch.__version__); print("GPUs:", torch.cuda.device_count())'
part doctor 90 "$python" -m rxt_dist doctor
# Tests first, in a third of the time: the speed of a step that computes something else is worth nothing.
cores=$(nproc)
jobs=$((cores > 8 ? 4 : 1))
scratch="$(mktemp -d)"
test_file() {
    local name
    name="$(basename "$1")"
    # $4 is when all of them end.
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" timeout --kill-after=10 "$(($4 > $(date +%s) ? $4 - $(date +%s) : 1))" "$2" -m pytest "$1" -k "$3" -rfEs \
        -p no:cacheprovider --timeout=120 --durations=5 > "$5/$name.log" 2>&1
    echo $? > "$5/$name.code"
}
export -f test_file
printf '%s\n' "${files[@]}" | xargs -P "$jobs" -I {} \
    bash -c 'test_file "$@"' test {} "$python" "$tests" "$(($(date +%s) + $(left) / 3))" "$scratch"
for file in "${files[@]}"; do
    name="$(basename "$file")" code="$(cat "$scratch/$(basename "$file").code" 2>/dev/null || echo none)"
    { printf '\n===== %s\n' "$file"; cat "$scratch/$name.log"; } >> "$log"
    # 5: no test was chosen.
    case "$code" in
        0 | 5) say "$file: ok" ;;
        124) say "$file: FAILED, out of time" ;;
        *) say "$file: FAILED, exit code $code" ;;
    esac
done
rm -rf "$scratch"
part benchmark "$(left)" "$python" benchmarks/gpu.py --out "$out" \
    --minutes "$(awk -v seconds="$(left)" 'BEGIN {print (seconds - 5) / 60}')" "${options[@]}"

say "done: $out"
{
    grep -hE '^(MISSING: |FAILED |ERROR |SKIPPED \[|[0-9]+ (passed|failed|skipped|error))' "$log" | cut -c1-240
    grep -hE -B 2 '^\*\*(failed|skipped)\*\*' "$out/gpu.md" 2>/dev/null | grep -vE '^(--)?$'
} | tee -a "$summary"
! grep -qE 'FAILED|ERROR|SKIPPED, no time' "$summary"
