#!/bin/bash
# What is to be seen on a GPU, part by part; each takes one to three minutes:
#
#   benchmarks/gpu.sh tests|demo|stacks|rounds|large|cells OUT DATA_DIR
#
# Logs and result files go to OUT. A part that takes too long is stopped and keeps what it has.
set -u
out=$2 data=$3
cli() {
    timeout -s INT "$1" python3 -c \
        'import sys; from fedjax_sec.cli import main; sys.argv[0] = "fedjax-sec"; sys.exit(main())' \
        "${@:2}"
}
case $1 in
tests) # what is marked `gpu`, all kernels, rounds, and the contract of every component
    XLA_PYTHON_CLIENT_PREALLOCATE=false timeout -s INT 170 \
        python3 -m pytest -q -p no:cacheprovider -n 12 --tb short -m 'not slow' \
        tests/test_contract.py tests/test_sharded.py tests/test_ops.py tests/test_kernels.py \
        tests/test_round.py tests/test_iterative.py >"$out/tests.log" 2>&1
    grep -E '^(E  |FAILED)|passed' "$out/tests.log" | cut -c1-300 | tail -40 ;;
demo) cli 170 demo --out "$out/demo" | tail -40 ;;
stacks)
    cli 60 bench order --out "$out/order_gpu.json"
    cli 90 bench aggregators --size 51,80000 --size 100,1000000 --size 100,11000000 \
        --out "$out/aggregators_gpu.json" ;;
rounds)
    cli 60 bench rounds --only "ALIE, trimmed" --only "no attack, mean" --repeats 5 \
        --data-dir "$data" --out "$out/rounds_gpu.json" ;;
large)
    cli 170 bench rounds --only "FLTrust CNN, mean" --only PGD --only RLR --repeats 3 \
        --data-dir "$data" --out "$out/rounds_large_gpu.json" ;;
cells) cli 90 bench scaling --only cells --repeats 3 --data-dir "$data" --out "$out/cells_gpu.json" ;;
esac
