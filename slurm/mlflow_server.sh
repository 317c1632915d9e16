#!/usr/bin/env bash
# An MLflow server on a PostgreSQL of its own, for trying tracking.uri and for the tests; both on 127.0.0.1 only.
#
#   slurm/mlflow_server.sh up       start both; the last line printed is `tracking.uri=http://...`
#   slurm/mlflow_server.sh stop     the server alone, as when it fails; `up` starts it again with all its runs
#   slurm/mlflow_server.sh status   what runs
#   slurm/mlflow_server.sh down     stop both, by their process ids, and remove database and artifacts
#
# Settings: MLFLOW_ROOT (database, artifacts, logs; default .mlflow-dev), PORT=25000 (PostgreSQL: the next one),
# PYTHON=.venv/bin/python (with the extra `server`). Needs Debian's package postgresql. PostgreSQL refuses to run as
# root: started by root it runs as the package's user postgres.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
ROOT=${MLFLOW_ROOT:-$HERE/.mlflow-dev}
PORT=${PORT:-25000} PYTHON=${PYTHON:-$HERE/.venv/bin/python}
BIN=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1 || true)
DATA=${TMPDIR:-/tmp}/realsr-postgres-$PORT
export PGPASSFILE=$ROOT/pgpass MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

as_postgres() {
    if [ "$(id -u)" = 0 ]; then (cd / && runuser -u postgres -- "$@"); else "$@"; fi
}

alive() { # the process of an id file; a zombie counts as gone
    local state
    [ -f "$1" ] && state=$(sed 's/.*) //' "/proc/$(head -n 1 "$1")/stat" 2>/dev/null) && [ -n "$state" ] &&
        [ "${state:0:1}" != Z ]
}

start_postgres() {
    local password
    if [ ! -d "$DATA" ]; then
        password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
        (umask 077 && echo "127.0.0.1:$((PORT + 1)):*:mlflow:$password" >"$PGPASSFILE")
        as_postgres mkdir -m 700 "$DATA"
        as_postgres dd of="$DATA/password" status=none <<<"$password"
        as_postgres "$BIN/initdb" -D "$DATA/db" -U mlflow --auth=scram-sha-256 --no-sync --pwfile="$DATA/password" \
            >"$ROOT/postgres.log" 2>&1
    fi
    as_postgres "$BIN/pg_ctl" -D "$DATA/db" -l "$DATA/log" -w -t 60 \
        -o "-p $((PORT + 1)) -c listen_addresses=127.0.0.1 -c unix_socket_directories='$DATA'" start >/dev/null
    "$BIN/psql" -h 127.0.0.1 -p $((PORT + 1)) -U mlflow -d postgres -qc 'create database mlflow' 2>/dev/null || true
}

up() {
    [ -n "$BIN" ] || { echo "missing package: postgresql (apt-get install postgresql)" >&2; exit 3; }
    alive "$ROOT/server.pid" && { echo "already up in $ROOT" >&2; exit 1; }
    [ ! -d "$DATA" ] || [ -f "$PGPASSFILE" ] || { echo "$DATA is another server's: choose another PORT" >&2; exit 1; }
    mkdir -p -m 700 "$ROOT"
    as_postgres "$BIN/pg_ctl" -D "$DATA/db" status >/dev/null 2>&1 || start_postgres
    setsid "$PYTHON" -m mlflow server --host 127.0.0.1 --port "$PORT" --workers 1 \
        --backend-store-uri "postgresql://mlflow@127.0.0.1:$((PORT + 1))/mlflow" \
        --artifacts-destination "$ROOT/artifacts" >>"$ROOT/server.log" 2>&1 </dev/null &
    echo $! >"$ROOT/server.pid"
    local i
    for i in $(seq 600); do
        "$PYTHON" - "$PORT" <<<'import socket, sys; socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1)' \
            2>/dev/null && break
        alive "$ROOT/server.pid" || { tail -n 5 "$ROOT/server.log" >&2; exit 1; }
        sleep .2
    done
    echo "tracking.uri=http://127.0.0.1:$PORT"
}

stop() { # the server leads a process group of its own
    local pid i
    [ -f "$ROOT/server.pid" ] || return 0
    pid=$(cat "$ROOT/server.pid")
    kill -- "-$pid" 2>/dev/null || true
    for i in $(seq 100); do kill -0 -- "-$pid" 2>/dev/null || break; sleep .1; done
    kill -9 -- "-$pid" 2>/dev/null || true
    rm -f "$ROOT/server.pid"
}

down() {
    stop
    [ ! -d "$DATA" ] || as_postgres "$BIN/pg_ctl" -D "$DATA/db" -m fast -w stop >/dev/null 2>&1 || true
    rm -rf "$DATA" "$ROOT/artifacts" "$PGPASSFILE"
}

status() {
    alive "$ROOT/server.pid" && echo "MLflow: up on 127.0.0.1:$PORT" || echo "MLflow: down"
    [ -d "$DATA" ] && as_postgres "$BIN/pg_ctl" -D "$DATA/db" status | head -n 1 || echo "PostgreSQL: down"
}

case ${1:-} in
    up) up ;;
    stop) stop ;;
    status) status ;;
    down) down ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
