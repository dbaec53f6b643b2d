# Shell functions for the scripts that make the runs under results/; source this file from the project's folder.
# Finished runs are left alone and stopped runs are resumed, so every script can be stopped and called again. A run
# that was killed before its first save starts again.
#
# Settings, as environment variables:
#   OUT      folder of the runs
#   MINUTES  stop after so many minutes, saving first; 0 = no limit    (0)
#   DEVICE   --cuda, or empty for the CPU
#   PYTHON   the interpreter                                            (python)
PYTHON=${PYTHON:-python}
MINUTES=${MINUTES:-0}

finished() { grep -qsE '"event": "(test|final)"' "$OUT/$1/log.jsonl"; }

# limited COMMAND...: run a command for no longer than MINUTES in all; SIGTERM makes a training script save.
limited() {
    local status=0 left=$((MINUTES * 60 - SECONDS))
    if ((MINUTES == 0)); then
        "$@"
    else
        if ((left > 0)); then timeout --signal=TERM "$left" "$@" || status=$?; else status=124; fi
        if ((status == 124)); then echo "the $MINUTES minutes are over: call the script again to continue"; exit 0; fi
        return "$status"
    fi
}

# train SCRIPT NAME FLAGS...: start the run OUT/NAME, resume it, or skip it if it is finished.
train() {
    if finished "$2"; then return; fi
    if [[ -e $OUT/$2/last.pt ]]; then
        limited "$PYTHON" "$1.py" --resume "$OUT/$2" $DEVICE
    else
        rm -rf "${OUT:?}/$2"
        limited "$PYTHON" "$1.py" "${@:3}" --runs-folder "$OUT" --name "$2" $DEVICE
    fi
}
