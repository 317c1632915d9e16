import threading
import time

from realsr_hpc.launch.turns import turn


def test_no_more_runs_at_once_than_slots(tmp_path):
    running, most = [], []

    def work(place):
        with turn(tmp_path / "slots", 2, place) as slot:
            running.append(slot)
            most.append(sorted(running))
            time.sleep(0.2)
            running.remove(slot)

    threads = [threading.Thread(target=work, args=[place]) for place in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 5 and max(map(len, most)) == 2 and all(len(set(slots)) == len(slots) for slots in most)


def test_the_first_that_waits_goes_first_and_the_dead_do_not_wait(tmp_path):
    (tmp_path / "waiting-00000000000000000001").touch()  # of a process that died
    order = []

    def work(place):
        with turn(tmp_path, 1, place):
            order.append(place)

    with turn(tmp_path, 1, 2):
        threads = [threading.Thread(target=work, args=[place]) for place in (5, 3, 4)]
        for thread in threads:
            thread.start()
        while len(list(tmp_path.glob("waiting-*"))) < 3:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert order == [3, 4, 5] and not list(tmp_path.glob("waiting-*"))
