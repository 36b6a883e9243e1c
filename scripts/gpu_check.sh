#!/usr/bin/env bash
# Checks that need a CUDA GPU, in one command:
#
#     scripts/gpu_check.sh [--quick] [RESULTS_FOLDER]        default benchmarks/results
#
# Runs every step below, the next one also after a failure, prints one table at the end, and writes
# RESULTS_FOLDER/gpu_check.json with the steps' exit statuses and seconds. Exits 1 if any step failed,
# 2 without a GPU. --quick runs `proxy-vllm doctor` alone, in less than 5 minutes.
# PYTHON chooses the interpreter; STEPS="a b" runs some steps alone, and STEPS=list names them. Every
# step ends within 10 minutes, for machines that are lent so long, and the results of other steps stay.
set -u
cd "$(dirname "$0")/.."
if [ "${1:-}" = --quick ]; then
    STEPS=doctor
    shift
fi
out=${1:-benchmarks/results}
python=${PYTHON:-python}

# A step is a name, a time limit in seconds and a command that writes its results to $out.
step() { steps+=("$1 $2 ${*:3}"); }
steps=()
tests=tests/kernels/test_
step doctor 300 '$python -m proxy_vllm.cli.main doctor --json $out/doctor.json'
# One engine a process: vLLM counts waits and compilations from the end of its first warm-up.
step strict_tests 590 VLLM_GPU_SYNC_CHECK=error pytest_json strict_tests -m gpu tests/e2e/test_gpu_strict.py
step kernel_tests 580 pytest_json kernel_tests "${tests}"{sample,combine,arguments,precision,reference}.py
step filter_tests 580 pytest_json filter_tests "${tests}"{filters,fused_head,dispatch,distribution,sharded}.py
step kernel_gpu_tests 580 pytest_json kernel_gpu_tests -m gpu tests/kernels
step gpu_tests 590 pytest_json gpu_tests -m gpu tests/e2e/test_gpu.py
step graph_tests 590 pytest_json graph_tests -m gpu tests/e2e/test_graphs.py
step own_prompts 590 pytest_json own_prompts -m gpu 'tests/e2e/test_own_prompts*.py'
step kernel_resources 580 '$python -m kernel_bench.resources --json $out/kernel_resources.json'
step kernel_bench 480 '$python scripts/bench_kernels.py --out $out/kernels.json'
step step_bench 480 '$python scripts/bench_step.py --json $out/step.json'
step step_sampler 480 '$python scripts/bench_step.py --repeats 3 --systems proxy sampler_graphs' \
    '--json $out/step_sampler_graphs.json'
step step_adapters 480 '$python scripts/bench_step.py --repeats 3 --systems proxy adapters --batch 1 8 64' \
    '--json $out/step_adapters.json'
step one_pass 480 '$python scripts/bench_one_pass.py --rounds 2 --json $out/one_pass.json'
step step_fused_head 480 '$python scripts/bench_step.py --repeats 3 --systems proxy fused_head' \
    '--json $out/step_fused_head.json'
step draft_tests 590 pytest_json draft_tests tests/e2e/test_speculation.py -m "'not slow'"
step speculation_bench 590 '$python scripts/bench_speculation.py --json $out/speculation.json'
step speculation_8b 590 '$python scripts/bench_speculation.py --json $out/speculation_8b.json' \
    '--trios ceiling-8b --modes compiled --batches 1 64 --systems base expert base_drafted --repeats 2' \
    "--engine-args '{\"kv_cache_memory_bytes\": 2147483648}'"
step own_prompts_bench 480 '$python scripts/bench_own_prompts.py --json $out/own_prompts_bench.json'
step explain_bench 480 '$python scripts/bench_explain.py --batch 1 8 64 256 --json $out/explain.json'

if [ "${STEPS:-}" = list ]; then
    for each in "${steps[@]}"; do
        read -r name limit _ <<<"$each"
        echo "$name (up to $limit s)"
    done
    exit 0
fi
for name in ${STEPS:-}; do
    if ! printf '%s\n' "${steps[@]%% *}" | grep -qx "$name"; then
        echo "gpu_check: error: STEPS: no step $name; STEPS=list names them" >&2
        exit 2
    fi
done
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: error: no CUDA GPU found (PYTHON=$python); run it on a machine with one" >&2
    exit 2
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)

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
table=""
for each in "${steps[@]}"; do
    read -r name limit command <<<"$each"
    if [ -n "${STEPS:-}" ] && [[ " $STEPS " != *" $name "* ]]; then
        continue
    fi
    echo "== $name"
    start=$SECONDS
    timeout "$limit" bash -c "$command"
    status=$?
    [ "$status" -ne 0 ] && failed=1
    report+="${report:+,}\"$name\": {\"status\": $status, \"seconds\": $((SECONDS - start))}"
    case $status in
    0) word=passed ;;
    124) word="failed (after its limit of $limit s)" ;;
    *) word="failed (status $status)" ;;
    esac
    table+=$(printf '%-20s %6d s  %s' "$name" "$((SECONDS - start))" "$word")$'\n'
done
"$python" - "$out/gpu_check.json" "{$report}" <<'PYTHON'
import json, sys
from pathlib import Path

path = Path(sys.argv[1])
before = json.loads(path.read_text()) if path.exists() else {}
path.write_text(json.dumps({**before, **json.loads(sys.argv[2])}, indent=1) + "\n")
PYTHON
printf '\n%s' "$table"
exit "$failed"
