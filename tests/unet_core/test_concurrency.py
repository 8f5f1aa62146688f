import threading
import time
from concurrent.futures import ThreadPoolExecutor

from unet_core.concurrency import Prefetch


def test_results_come_in_order_and_no_more_wait_than_the_budget_allows():
    lock, alive, most = threading.Lock(), 0, 0

    def work(number):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        time.sleep(0.002 * (number % 3))
        return number

    with (
        ThreadPoolExecutor(4) as pool,
        Prefetch(pool, work, iter(range(40)), 10, lambda _: 100, 300) as results,
    ):
        seen = []
        for number in results:
            seen.append(number)
            time.sleep(0.002)
            with lock:
                alive -= 1
    assert seen == list(range(40))
    assert most <= 4  # three, and the one that is handed over


def test_an_item_heavier_than_the_budget_goes_alone():
    with (
        ThreadPoolExecutor(2) as pool,
        Prefetch(pool, lambda n: n, iter(range(5)), 4, lambda _: 100, 1) as results,
    ):
        assert list(results) == list(range(5))


def test_items_weigh_until_they_are_worked_on():
    drawn, may_work = [], threading.Event()

    def items():
        for number in range(12):
            drawn.append(number)
            yield number

    def work(number):
        assert number == 0 or may_work.wait(30)
        return number

    with (
        ThreadPoolExecutor(8) as pool,
        Prefetch(pool, work, items(), 10, lambda _: 1, 300, lambda _: 100) as results,
    ):
        assert next(iter(results)) == 0
        time.sleep(0.1)
        assert len(drawn) == 4  # two under way besides the first, one that finds no room
        may_work.set()
        assert list(results) == list(range(1, 12))
