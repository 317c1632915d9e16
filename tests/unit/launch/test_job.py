"""The supervisor with real processes: ends them together, passes signals on, notices a hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.config.load import compose
from realsr_hpc.launch.environment import Placement, job_port, reserved_port, slurm_job_id
from realsr_hpc.launch.health import node_faults
from realsr_hpc.launch.job import start_ranks, watch
from realsr_hpc.launch.signals import StopFlag
from realsr_hpc.launch.verdict import CRASHED, FAILED, HUNG, Verdict, agree, count_requeue
from realsr_hpc.parallel.process_groups import rendezvous_store
from realsr_hpc.runfolder import rank_log

PREAMBLE = (
    "import os, signal, sys, time; rank = int(os.environ['RANK']); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); "
)
WAIT_FOR_STOP = (
    "asked = []; signal.signal(signal.SIGUSR2, lambda *_: asked.append(1)); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])\n"
    "while not asked: time.sleep(.02)\n"
    "sys.exit(85)"
)

ONE_DIES_THE_OTHER_RAISES = """
if rank == 1:
    open(path, 'w').write(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)
def partner_lives():
    try:
        return open(f'/proc/{open(path).read()}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return not os.path.exists(path)
while partner_lives(): time.sleep(.01)
sys.exit('connection closed by peer')
"""


def run(tmp_path, body: str, *overrides: str, tasks: int = 2, stop: StopFlag | None = None):
    config = compose(["recipe=grpo_tiny", f"cluster.tasks_per_node={tasks}", *overrides])
    placement = Placement.find(config, {})
    ranks = start_ranks(config, tmp_path, placement, [sys.executable, "-c", PREAMBLE + body])
    code, message, _ = watch(ranks, config, tmp_path, placement, stop or StopFlag())
    assert all(process.poll() is not None for process in ranks.values()), "a rank outlived its job"
    return code, message


def test_ranks_know_their_place(tmp_path):
    body = "print(*[os.environ[k] for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')])"
    assert run(tmp_path, body) == (0, "")
    assert rank_log(tmp_path, 1).read_text().splitlines()[-1] == "1 2 1 127.0.0.1"


def test_a_failed_rank_ends_the_others_and_its_error_is_shown(tmp_path):
    started = time.time()
    code, message = run(tmp_path, "sys.exit('no such weights') if rank == 1 else time.sleep(600)")
    assert code == FAILED and "rank 1 ended with code 1" in message and "no such weights" in message
    assert time.time() - started < 30


def test_a_killed_rank_is_the_cause_although_its_partner_raised(tmp_path):
    code, message = run(tmp_path, f"path = {str(tmp_path / 'pid')!r}\n" + ONE_DIES_THE_OTHER_RAISES)
    assert code == CRASHED and "rank 1 was killed by SIGKILL" in message


@pytest.mark.parametrize(
    ("others", "cause"),
    [
        ([Verdict(1, CRASHED, "rank 2 was killed", 5.0)], "rank 2 was killed"),
        ([Verdict(1, FAILED, "no such weights", 3.0)], "no such weights"),
        ([Verdict(1, FAILED, "connection closed", 5.0)], "mine"),
        ([], "node 1 of the job is gone; mine"),
    ],
)
def test_nodes_agree_on_the_cause(tmp_path, others, cause):
    placement = Placement(0, 2, 1, "127.0.0.1", 1, "7", 0)
    for verdict in others:
        agree(tmp_path, replace(placement, node_rank=1), verdict, wait_s=0.0)
    assert agree(tmp_path, placement, Verdict(0, FAILED, "mine", 4.0), wait_s=0.3).message == cause


def test_a_rank_killed_on_its_way_out_is_a_consequence_of_the_stop(tmp_path):
    """srun ends the rest of the job when the first node leaves: the run was stopped, not killed."""
    placement = Placement(0, 2, 1, "127.0.0.1", 1, "7", 0)
    for left in (STOPPED, DONE):
        job = replace(placement, job_id=str(left))
        agree(tmp_path, job, Verdict(0, left, "", 2.0))
        agreed = agree(tmp_path, replace(job, node_rank=1), Verdict(1, CRASHED, "killed by SIGTERM", 1.0), wait_s=0.0)
        assert (agreed.code, agreed.node, agreed.all_present) == (left, 0, False)


def test_a_signal_while_a_process_leaves_does_not_change_its_exit_code():
    body = (
        "import sys; from realsr_hpc.launch.signals import StopFlag\n"
        "stop = StopFlag.install()\nstop.retire()\nprint('leaving', flush=True)\nsys.exit(85)"
    )
    with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"leaving\n"
        while process.poll() is None:
            process.send_signal(signal.SIGUSR2)
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 85


def test_requeues_are_counted_from_the_last_new_step(tmp_path):
    assert [count_requeue(tmp_path, 0), count_requeue(tmp_path, 0)] == [1, 2]
    (tmp_path / "progress.json").write_text(json.dumps({"step": 4}))
    assert [count_requeue(tmp_path, 0), count_requeue(tmp_path, 0)] == [1, 2]


def test_a_stop_reaches_every_rank_and_the_job_ends_as_stopped(tmp_path):
    stop = StopFlag()
    timer = threading.Timer(0.5, stop.ask)
    timer.start()
    assert run(tmp_path, WAIT_FOR_STOP, stop=stop) == (STOPPED, "")
    timer.join()


def test_a_hang_is_aborted_with_its_stack_in_the_log(tmp_path):
    """Rank 0 sleeps; rank 1 was stopped by the kernel and cannot even say so before it is woken."""
    body = (
        "from realsr_hpc.launch.signals import StopFlag; StopFlag.install()\n"
        "def stuck_here(): os.kill(os.getpid(), signal.SIGSTOP) if rank else time.sleep(600)\nstuck_here()"
    )
    code, message = run(tmp_path, body, "cluster.hang_limit_s=5")  # long enough for Python to start
    assert code == HUNG and "no step for 5 s" in message
    for rank in (0, 1):
        assert "most recent call first" in rank_log(tmp_path, rank).read_text()
        assert "in stuck_here" in rank_log(tmp_path, rank).read_text()


def test_a_node_that_would_see_a_hang_later_hears_of_it_and_leaves_its_stacks_too(tmp_path):
    """Nodes that did not start together: the first to see it must not take the other's ranks with it unheard."""
    recipe = ["recipe=grpo_tiny", "cluster.tasks_per_node=1"]
    configs = {node: compose([*recipe, f"cluster.hang_limit_s={limit}"]) for node, limit in enumerate((5, 600))}
    body = "from realsr_hpc.launch.signals import StopFlag; StopFlag.install()\nwhile True: time.sleep(600)"
    verdicts = {}

    def node(number: int) -> None:
        config = configs[number]
        placement = replace(Placement.find(config, {}), num_nodes=2, node_rank=number, job_id="7", master_port=1)
        ranks = start_ranks(config, tmp_path, placement, [sys.executable, "-c", PREAMBLE + body])
        verdicts[number] = watch(ranks, config, tmp_path, placement, StopFlag())[0]

    nodes = [threading.Thread(target=node, args=(number,)) for number in configs]
    for thread in nodes:
        thread.start()
    for thread in nodes:
        thread.join(60)
    assert verdicts == {0: HUNG, 1: HUNG}
    for rank in configs:
        assert "most recent call first" in rank_log(tmp_path, rank).read_text()


def test_progress_keeps_the_watchdog_quiet(tmp_path):
    body = f"path = {str(tmp_path / 'progress.json')!r}\nfor _ in range(70): open(path, 'w').close(); time.sleep(.1)"
    assert run(tmp_path, body, "cluster.hang_limit_s=6", tasks=1)[0] == 0


def test_placement_follows_slurm():
    config = compose(["recipe=grpo_7b"])
    environment = {
        "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
    }  # fmt: skip
    placement = Placement.find(config, environment)
    assert (placement.node_rank, placement.num_nodes, placement.master_addr) == (1, 2, "10.0.0.7")
    assert placement.rank_environment(config, 3)["RANK"] == "7"
    assert placement.rank_environment(config, 3)["WORLD_SIZE"] == "8"
    assert "GLOO_SOCKET_IFNAME" not in placement.rank_environment(config, 0)  # of the job's address, not loopback
    with pytest.raises(ValueError, match="Slurm gave 3"):
        Placement.find(config, environment | {"SLURM_JOB_NUM_NODES": "3"})


def test_a_requeued_job_gets_another_port_and_an_array_task_its_own_id():
    assert job_port(4711, 0) != job_port(4711, 1)
    assert 20000 <= job_port(10**9, 5) < 30000
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm_job_id(array) == "10_2" and slurm_job_id({"SLURM_JOB_ID": "12"}) == "12"


def test_a_taken_port_is_noticed_before_ranks_meet_and_jobs_of_one_node_take_free_ones():
    alone = compose(["recipe=grpo_tiny", "cluster.kind=slurm"])
    environment = {"SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "4711"}
    placement = Placement.find(alone, environment)
    assert placement.master_addr == "127.0.0.1" and placement.port_fault() == ""
    assert placement.rank_environment(alone, 0)["GLOO_SOCKET_IFNAME"] == "lo"
    with socket.create_server(("127.0.0.1", placement.master_port)):
        assert f"port {placement.master_port}" in placement.port_fault()
        assert Placement.find(alone, environment).master_port != placement.master_port


def test_a_port_is_reserved_until_rank_0_listens_on_it():
    """Whoever else asks for it, as connections and other programs do, is refused."""
    port = reserved_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    store = rendezvous_store("127.0.0.1", port, 0, 1, timedelta(seconds=30))
    store.set("met", "yes")
    assert store.get("met") == b"yes"


def test_a_node_without_its_gpus_is_unfit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_faults(compose(["recipe=grpo_tiny"]), tmp_path) == []
    faults = node_faults(compose(["recipe=grpo_7b"]), tmp_path)
    assert len(faults) == 1 and "0 working GPUs, 4 needed" in faults[0]


def test_a_forked_child_does_not_set_its_parents_flag():
    flag = StopFlag()
    child = os.fork()
    if child == 0:
        flag.ask()
        os._exit(int(flag()))
    assert os.waitpid(child, 0)[1] == 0
    flag.ask()
    assert flag() and not flag.warned
    flag.ask(signal.SIGUSR2)
    assert flag.warned
