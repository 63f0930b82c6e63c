# shellcheck shell=bash
# What the svm and vmx lanes share: one job in one L1. Sourced after lib.sh. The lane defines
# launch(), which starts the emulator in the background and sets machine to its process.

# Shared by both lanes' options; the lane may have set other values before.
timeout=${timeout:-1800}
machine='' why='' job='' log='' keep_log=''
readers=()

# start_job LANE: a folder for the job and a name for L1's log, and the promise that on every way
# out no process and no folder is left.
start_job() {
    mkdir -p "$lanes/jobs" "$lanes/logs"
    # What a killed run or a failed one of days ago left.
    find "$lanes/jobs" "$lanes/logs" -mindepth 1 -maxdepth 1 -mtime +2 -exec rm -rf {} +
    job=$(mktemp -d "$lanes/jobs/$1.XXXXXX")
    log=$lanes/logs/${job##*/}.log
    trap end_job EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    deadline=$((SECONDS + timeout))
}

stop_machine() {
    [ -n "$machine" ] || return 0
    kill -KILL "$machine" 2>/dev/null || true
    wait "$machine" 2>/dev/null || true
    machine=
}

# shellcheck disable=SC2317  # the trap calls it
end_job() {
    stop_machine
    [ ${#readers[@]} -eq 0 ] || kill "${readers[@]}" 2>/dev/null || true
    rm -rf "$job"
    [ -n "$keep_log" ] || rm -f "$log" "$log".*
}

# Becomes a command that dies with this script even if that is killed outright. For a background
# process or another subshell only.
with_us() { exec setpriv --pdeathsig KILL "$@"; }

running() { [ -n "$machine" ] && kill -0 "$machine" 2>/dev/null; }

check_time() {
    if [ "$SECONDS" -ge "$deadline" ]; then
        keep_log=yes
        show_complaints
        note "timed out after $timeout s; L1's log is $log"
        exit 124
    fi
}

# Shows the end of L1's log and says why.
lane_failed() {
    local panic
    keep_log=yes
    tail -n 20 "$log.emulator" "$log" >&2 || true
    panic=$(grep -a -h -m 1 -o -e 'Kernel panic.*' -e 'Triple fault' "$log" "$log".resets 2>/dev/null | head -n 1 || true)
    die 125 "$why${panic:+ ($panic)}; L1's log is $log"
}

# What L1's kernel complained of, for a command that failed: a machine that is too slow to emulate
# another one shows there first.
show_complaints() {
    local found
    # None is no failure of this script, whose status would be taken for the command's.
    found=$(grep -a -E '\bstall|lockup|hung task|BUG:|WARNING:|Oops|Out of memory|interrupt took|clocksource.*unstable' "$log" | tail -n 20) || true
    [ -z "$found" ] || printf "L1's kernel said:\n%s\n" "$found" >&2
}

# Starts L1 and waits until it has begun the job.
boot_once() {
    local limit=$((SECONDS + boot_timeout))
    launch
    until [ -e "$job/begin" ]; do
        if ! running; then
            why='L1 ended before it could start the command'
            return 1
        fi
        if [ "$SECONDS" -ge "$limit" ]; then
            why="L1 did not come up within $boot_timeout s"
            return 1
        fi
        check_time
        sleep 0.1
    done
}

# An emulated L1 now and then hangs in its boot. As the command has not begun then, starting anew
# hides nothing of it.
boot() {
    boot_once && return 0
    note "$why; trying once more"
    stop_machine
    [ ! -e "$log" ] || mv -f "$log" "$log.1"
    boot_once || lane_failed
}

# Ends with the job's status once it has one and all of its output is read.
finish_job() {
    until [ -s "$job/exit" ]; do
        if ! running; then
            # Its last words may still be on their way through the reader.
            sleep 0.5
            [ ! -s "$job/exit" ] || break
            why='L1 died while the command ran'
            lane_failed
        fi
        # Whoever read the output is gone, as with a closed pipe.
        kill -0 "${readers[0]}" 2>/dev/null || [ -s "$job/exit" ] || exit 141
        check_time
        sleep 0.1
    done
    stop_machine
    wait "${readers[@]}" || true
    readers=()
    local status
    status=$(<"$job/exit")
    [ "$status" -eq 0 ] || show_complaints
    exit "$status"
}

# The job as a script for a POSIX shell: the environment both lanes pass on, then the command.
# job_script LANE FOLDER COMMAND...
job_script() {
    local name word
    for name in "${passed_on[@]}"; do
        [ -z "${!name+set}" ] || printf 'export %s=%s\n' "$name" "$(quote "${!name}")"
    done
    printf 'export TRAPLINE_LANE=%s\n' "$1"
    printf 'cd %s || exit 125\nexec' "$(quote "$2")"
    shift 2
    for word in "$@"; do
        printf ' %s' "$(quote "$word")"
    done
    printf '\n'
}
