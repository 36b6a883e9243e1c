#!/usr/bin/env bash
# Checks that need a CUDA GPU, in one command:
#
#     scripts/gpu_check.sh [RESULTS_FOLDER]        default benchmarks/results
#
# Runs every step below, the next one also after a failure, and writes RESULTS_FOLDER/gpu_check.json
# with the steps' exit statuses and seconds. Exits 1 if any step failed, 2 without a GPU.
# PYTHON chooses the interpreter; STEPS="a b" runs some steps alone.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
python=${PYTHON:-python}
mkdir -p "$out"
out=$(cd "$out" && pwd)

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: error: no CUDA GPU found (PYTHON=$python); run it on a machine with one" >&2
    exit 2
fi

# A step is a name, a time limit in seconds and a command that writes its results to $out.
steps=(
    "kernel_tests 900 pytest_json kernel_tests tests/kernels"
    "gpu_tests 900 pytest_json gpu_tests -m gpu tests --ignore=tests/kernels"
    "kernel_resources 600 $python -m proxy_vllm.kernels.resources --json $out/kernel_resources.json"
    "kernel_bench 540 $python scripts/bench_kernels.py --out $out/kernels.json"
)

# pytest_json NAME ARGS...: runs pytest, and turns its XML report into $out/NAME.json.
pytest_json() {
    local name=$1 status
    shift
    "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/$name.xml" "$@"
    status=$?
    "$python" - "$out/$name" <<'PYTHON'
import json, sys
import xml.etree.ElementTree as tree
from pathlib import Path

name = sys.argv[1]
suite = tree.parse(f"{name}.xml").getroot().find("testsuite")
keys = ("tests", "failures", "errors", "skipped")
report = {key: int(suite.get(key)) for key in keys} | {"seconds": float(suite.get("time"))}
bad = [c for c in suite.iter("testcase") if c.find("failure") is not None or c.find("error") is not None]
report["failed"] = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
Path(f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
Path(f"{name}.xml").unlink()
PYTHON
    # 5: no test was selected, which is no failure where no gpu test exists yet.
    [ "$status" -eq 5 ] && status=0
    return "$status"
}
export -f pytest_json
export out python

failed=0
report=""
for step in "${steps[@]}"; do
    read -r name limit command <<<"$step"
    if [ -n "${STEPS:-}" ] && [[ " $STEPS " != *" $name "* ]]; then
        continue
    fi
    echo "== $name"
    start=$SECONDS
    timeout "$limit" bash -c "$command"
    status=$?
    [ "$status" -ne 0 ] && failed=1
    report+="${report:+,}\"$name\": {\"status\": $status, \"seconds\": $((SECONDS - start))}"
    echo "== $name: status $status after $((SECONDS - start)) s"
done
echo "{$report}" | "$python" -m json.tool >"$out/gpu_check.json"
cat "$out/gpu_check.json"
exit "$failed"
