#!/usr/bin/env bash
# A real Slurm on one machine, without systemd, for trying launches and for the tests of tests/slurm.
#
#   slurm/dev_cluster.sh up       start it; the last line printed is `export SLURM_CONF=...`: eval it
#   slurm/dev_cluster.sh status   nodes and jobs
#   slurm/dev_cluster.sh down     stop what `up` started, by its process id files, and remove all of it but the logs
#
# Settings: SLURM_ROOT (state and logs, default .slurm-dev), NODES=2, CPUS=4 and GPUS=0 (pretended ones) a node,
# PORT=26800, GRACE=0 (seconds between the warning and the end of a preempted job), KILLWAIT=30 (seconds between SIGTERM
# and SIGKILL), ACCOUNTING=0 (1: slurmdbd on a MariaDB of its own, so that sacct answers), PARTITION=normal (name of the
# default partition), MAXARRAY=10001 (Slurm's MaxArraySize).
# Needs Debian's packages slurmctld, slurmd, slurm-client and munge (with ACCOUNTING=1 also slurmdbd and mariadb-server);
# they are named, not installed, when missing. Everything listens on 127.0.0.1 only.
# Partitions: PARTITION, and preemptible, whose jobs it preempts and requeues.
set -euo pipefail
HERE=$(cd "$(dirname "$0")/.." && pwd)
ROOT=${SLURM_ROOT:-$HERE/.slurm-dev}
NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-0} PORT=${PORT:-26800} GRACE=${GRACE:-0}
KILLWAIT=${KILLWAIT:-30} ACCOUNTING=${ACCOUNTING:-0} PARTITION=${PARTITION:-normal} MAXARRAY=${MAXARRAY:-10001}
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$ROOT/etc/slurm.conf

missing() {
    local program package absent=()
    for program in slurmctld slurmd munged; do
        command -v "$program" >/dev/null || { package=${program/munged/munge}; absent+=("$package"); }
    done
    command -v sbatch >/dev/null || absent+=(slurm-client)
    if [ "$ACCOUNTING" = 1 ]; then
        command -v slurmdbd >/dev/null || absent+=(slurmdbd)
        command -v mariadbd >/dev/null || absent+=(mariadb-server)
    fi
    [ ${#absent[@]} -eq 0 ] || { echo "missing packages: ${absent[*]} (apt-get install ${absent[*]})" >&2; return 0; }
    return 1
}

write_gpus() { # gres.conf wants device files: clones of /dev/null where mknod is allowed
    [ "$GPUS" -gt 0 ] || return 0
    local i
    mkdir -p "$ROOT/dev"
    for i in $(seq 0 $((GPUS - 1))); do
        [ -c "$ROOT/dev/gpu$i" ] || mknod -m 666 "$ROOT/dev/gpu$i" c 1 3
    done
    echo "NodeName=n[1-$NODES] Name=gpu Type=fake File=$ROOT/dev/gpu[0-$((GPUS - 1))]" >"$ROOT/etc/gres.conf"
}

write_configuration() {
    local user memory gres="" accounting="AccountingStorageType=accounting_storage/none"
    user=$(id -un)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    [ "$GPUS" -gt 0 ] && gres="Gres=gpu:fake:$GPUS"
    [ "$ACCOUNTING" = 0 ] || accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 2))
AccountingStoragePass=$ROOT/run/munge.sock"
    # cred_expire: a requeued job would wait two minutes otherwise. FirstJobId: ids never seen before in SLURM_ROOT.
    cat >"$ROOT/etc/slurm.conf" <<CONF
ClusterName=dev
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$((PORT + 1))
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
KillWait=$KILLWAIT
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PriorityType=priority/basic
MaxArraySize=$MAXARRAY
FirstJobId=$(($(date +%s) % 60000000 + 1))
$accounting
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-$NODES] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((PORT + 11))-$((PORT + 10 + NODES))] CPUs=$CPUS RealMemory=$memory $gres State=UNKNOWN
PartitionName=$PARTITION Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=preemptible Nodes=ALL MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE State=UP
CONF
}

start_accounting() { # a MariaDB and a slurmdbd of our own, as the calling user
    local socket=$ROOT/run/mysql.sock i
    mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$ROOT/mysql" --auth-root-authentication-method=normal \
        --skip-test-db >"$ROOT/log/mariadb.log" 2>&1
    setsid mariadbd --no-defaults --user="$(id -un)" --datadir="$ROOT/mysql" --socket="$socket" \
        --pid-file="$ROOT/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$((PORT + 3)) \
        --innodb-lock-wait-timeout=900 >>"$ROOT/log/mariadb.log" 2>&1 </dev/null &
    for i in $(seq 300); do mariadb -uroot -S "$socket" -e 'select 1' >/dev/null 2>&1 && break; sleep .1; done
    local password
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    mariadb -uroot -S "$socket" -e "create user slurm@'127.0.0.1' identified by '$password';
        grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
    (umask 077 && cat >"$ROOT/etc/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 2))
SlurmUser=$(id -un)
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 3))
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_acct_db
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.pid
CONF
    slurmdbd
    for i in $(seq 300); do sacctmgr -n -i list cluster >/dev/null 2>&1 && break; sleep .1; done
    sacctmgr -i -Q add cluster dev >/dev/null 2>&1 || true
}

up() {
    missing && exit 3
    [ ! -f "$ROOT/run/slurmctld.pid" ] || { echo "already up in $ROOT; '$0 down' first" >&2; exit 1; }
    mkdir -p "$ROOT"/{etc,run,log,state,spool}
    chmod 755 "$ROOT"
    trap '[ $? -eq 0 ] || down' EXIT
    write_gpus
    write_configuration
    [ -f "$ROOT/etc/munge.key" ] || (umask 077 && head -c 128 /dev/urandom >"$ROOT/etc/munge.key")
    munged --force --key-file="$ROOT/etc/munge.key" --socket="$ROOT/run/munge.sock" --pid-file="$ROOT/run/munged.pid" \
        --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/run/munge.seed" --num-threads=2
    [ "$ACCOUNTING" = 0 ] || start_accounting
    slurmctld -c -i
    local i
    for i in $(seq 1 "$NODES"); do slurmd -c -N "n$i"; done
    for i in $(seq 300); do
        [ "$(sinfo -h -N -p "$PARTITION" -t idle -o %N 2>/dev/null | wc -l)" = "$NODES" ] && break
        [ "$i" -lt 300 ] || { echo "the nodes did not come up; see $ROOT/log" >&2; exit 1; }
        sleep .1
    done
    echo "export SLURM_CONF=$SLURM_CONF"
}

alive() { # a zombie counts as gone
    local state
    state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [ -n "$state" ] && [ "${state:0:1}" != Z ]
}

down() {
    [ -d "$ROOT/run" ] || { echo "not up in $ROOT" >&2; exit 0; }
    local file pid i
    # Jobs first, and at once: without its slurmd a job would run on. What waits is cancelled before, or it would start.
    scancel --user="$(id -un)" --quiet --state=PENDING 2>/dev/null || true
    scancel --user="$(id -un)" --quiet --full --signal=KILL 2>/dev/null || true
    for i in $(seq 50); do [ -n "$(squeue --noheader 2>/dev/null)" ] || break; sleep .1; done
    scancel --user="$(id -un)" --quiet 2>/dev/null || true
    for file in "$ROOT"/run/slurmd-*.pid "$ROOT"/run/{slurmctld,slurmdbd,mariadbd,munged}.pid; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        for i in $(seq 100); do alive "$pid" || break; sleep .1; done
        ! alive "$pid" || kill -9 "$pid"
        rm -f "$file"
    done
    rm -rf "$ROOT"/{etc,run,state,spool,dev,mysql}
}

case ${1:-} in
    up) up ;;
    down) down ;;
    status) sinfo -N -o '%N %P %T %c %G' && squeue ;;
    *) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
