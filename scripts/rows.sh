# Sourced by the table scripts. run_rows OUTPUT COMMAND [FLAG...] reads rows 'NAME FLAGS' and runs each with every seed,
# the first seed of all rows before the second, further flags last, so that they override. A finished run is passed over,
# an unfinished one resumed. From the environment: SEEDS (default "0 1 2"), JOBS at a time (1), which share out the cores
# that they may use (and one GPU), LAUNCH (python, or "torchrun --nproc_per_node=8"), and DRY_RUN=1, which only prints
# the commands.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run_rows() {
    local output=$1 command=$2 seed row name flags extra=""
    local -a rows=() commands=()
    shift 2
    while read -r row; do rows+=("$row"); done
    [ $# = 0 ] || extra=$(printf ' %q' "$@")
    for seed in ${SEEDS:-0 1 2}; do
        for row in "${rows[@]}"; do
            read -r name flags <<<"$row"
            commands+=("${LAUNCH:-python} $command $flags --seed $seed --output $output --name $name-s$seed --resume$extra")
        done
    done
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s\n' "${commands[@]}"
        return
    fi
    bash scripts/setup.sh
    export PATH="$PWD/.venv/bin:$PATH"
    local jobs=${JOBS:-1}
    if [ "$jobs" -gt 1 ]; then
        local threads=$(($(python scripts/cores.py) / jobs))
        export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
    fi
    printf '%s\0' "${commands[@]}" | xargs -0 -P "$jobs" -I{} bash -c '{}'
}
