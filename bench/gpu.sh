#!/usr/bin/env bash
# What only a GPU can show, on a machine that is at hand for minutes: bench/gpu.sh FOLDER [PART ...]
# Each part has a time limit of its own and prints to FOLDER/PART.txt as well, so that a cut leaves what was done. Parts, with
# minutes on an H100's machine: build 1, tests 2, suite 5, sanitize 4, step 3, real 3, host 1, verdict 0, low 1, tune 4, bfloat16 3; all, if
# none is given.
# PYTHON, DEVICE=cpu and CASES may be set, to try the script elsewhere.
set -u
[ $# -ge 1 ] || { echo "usage: bench/gpu.sh FOLDER [build|tests|suite|sanitize|step|real|host|verdict|low|tune|bfloat16 ...]" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} device=${DEVICE:-cuda} failed=
export PYTHONUNBUFFERED=1 CUDAARCHS=${CUDAARCHS:-native} ADABAYES_FUSED_NATIVE=1

# run PART SECONDS COMMAND ...: its output to the part's file, and whether it failed into the summary
run() {
  local part=$1 limit=$2 begin=$SECONDS status
  shift 2
  echo "+ $*" | tee -a "$out/$part.txt"
  timeout -k 10 "$limit" "$@" 2>&1 | tee -a "$out/$part.txt"
  status=${PIPESTATUS[0]}
  echo "exit status $status after $((SECONDS - begin)) s" | tee -a "$out/$part.txt"
  [ "$status" = 0 ] || { failed="$failed $part($status)"; return 1; }
}

build() {  # by CMake alone where the machine's setuptools is too old
  run build 300 "$python" -m pip install -q --no-build-isolation --no-deps --no-index -e . ||
    run build 300 sh -c "cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE=\$(command -v $python) -DADABAYES_OUTPUT=\$PWD/adabayes_fused \
      -DADABAYES_TESTS=OFF && cmake --build build/gpu --target _native && ln -sfn ../triton_kernels adabayes_fused/triton_kernels"
  run build 60 "$python" -m adabayes_fused
}

tests() { run tests 300 "$python" -m pytest -q --durations 5 tests/test_gpu.py tests/test_gpu_host.py tests/test_codes.py tests/test_capture.py \
  tests/test_resume.py::test_a_captured_step_goes_on_from_what_is_loaded; }

# Every test that is made for a device, there; those of building, training and talking to other processes have none.
suite() {
  local others=(packaging train_lm distributed sharded_reports demo torch_suite frameworks native_build triton_compile bench gpu capture)
  local at_once=()
  others=("${others[@]/#/--ignore=tests/test_}")
  "$python" -c 'import xdist' 2>/dev/null && at_once=(-n 8)
  run suite 480 "$python" -m pytest -q "${at_once[@]}" -k "$device" --ignore-glob 'tests/test_paper*' "${others[@]/%/.py}"
}

sanitize() {
  run sanitize 150 "$python" tests/sanitize.py "$device" cuda triton
  for tool in memcheck initcheck racecheck synccheck; do
    run sanitize 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 7 --print-limit 20 \
      "$python" tests/sanitize.py "$device" cuda triton
  done
}

measure() {  # PART SECONDS BUDGET CASE ...
  local part=$1 limit=$2 budget=$3 who=()
  shift 3
  [ "$device" = cpu ] || who=("AdaBayes, triton" "AdaBayes lean, triton" "AdaBayes-FP, triton" "AdaBayes-FP lean, triton")
  who+=(AdaBayes "AdaBayes lean" AdaBayes-FP "AdaBayes-FP lean" "torch AdamW foreach" "torch AdamW compiled")
  who+=("slow path AdaBayes" "slow path AdaBayes, compiled" "torch-optimi AdamW" "flashoptim AdamW")
  run "$part" "$limit" "$python" -m bench step --device "$device" --cases "$@" --budget "$budget" --output "$out/$part" \
    --overwrite --contenders "${who[@]}"
}

step() { measure step 420 8 ${CASES:-1x256M resnet34 densenet121 gpt2}; }
bfloat16() { measure bfloat16 300 6 ${CASES:-1x256M:bfloat16 gpt2:bfloat16 1x256M:clipped}; }
low() {  # state and weights in codes, of which each has the verdict's floor of its own bytes
  local weights=("AdaBayes lean bfloat16 with 32bit weights" "AdaBayes lean 8bit with 24bit weights" "AdaBayes lean 8bit with stochastic weights")
  for dtype in "" :bfloat16; do
    run low 120 "$python" -m bench step --device "$device" --cases ${CASES:-1x256M$dtype} --budget 2 --output "$out/low${dtype#:}" --overwrite \
      --contenders "AdaBayes lean" "AdaBayes lean bfloat16" "AdaBayes lean 8bit" "AdaBayes-FP lean 8bit" "${weights[@]}" "flashoptim AdamW"
  done
}
real() {  # what training does besides: clips, and scales for float16
  measure real 420 4 ${CASES:-densenet121:clipped gpt2:clipped densenet121:scaled gpt2:scaled densenet121:scaled:clipped gpt2:scaled:clipped}
}
host() { run host 120 "$python" -m bench host --device "$device" --output "$out/host" --overwrite; }
verdict() { run verdict 60 "$python" -m bench.verdict "$out"/{step,real}; }
tune() { run tune 400 "$python" -m bench.tune --output "$out/tune" ${CASES:+--cases $CASES} ${VARIANTS:+--variants $VARIANTS}; }

for part in "${@:-all}"; do
  case $part in
    all) build; tests; suite; sanitize; step; real; host; verdict; low; tune; bfloat16 ;;
    build | tests | suite | sanitize | step | real | host | verdict | low | tune | bfloat16) "$part" ;;
    *) echo "there is no part $part" >&2; exit 2 ;;
  esac
done
echo "failed:${failed:- nothing}"
[ -z "$failed" ]
