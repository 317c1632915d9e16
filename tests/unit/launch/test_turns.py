import threading
import time

from realsr_hpc.launch.turns import turn


def test_no_more_runs_at_once_than_slots(tmp_path):
    running, most = [], []

    def work():
        with turn(tmp_path / "slots", 2) as slot:
            running.append(slot)
            most.append(sorted(running))
            time.sleep(0.2)
            running.remove(slot)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 5 and max(map(len, most)) == 2 and all(len(set(slots)) == len(slots) for slots in most)
