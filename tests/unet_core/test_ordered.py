import threading
import time
from concurrent.futures import ThreadPoolExecutor

from unet_core.ordered import Prefetch


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
