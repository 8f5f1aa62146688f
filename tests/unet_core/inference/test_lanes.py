import threading
from types import SimpleNamespace

from unet_core.inference.lanes import Lanes
from unet_core.runs.timings import Seconds


def test_the_device_goes_to_who_came_first_however_late():
    lanes, had = Lanes(SimpleNamespace(lanes=1)), []

    def take(name, ticket):
        with lanes.taken(ticket, Seconds()):
            had.append(name)

    with lanes.ticket() as first, lanes.ticket() as second:
        thread = threading.Thread(target=take, args=("second", second))
        thread.start()  # it is ready sooner
        thread.join(0.2)
        assert had == []
        take("first", first)
        thread.join(60)
    assert had == ["first", "second"]


def test_who_fails_in_line_lets_the_next_one_have_the_device():
    lanes, seconds = Lanes(SimpleNamespace(lanes=2)), Seconds()
    try:
        with lanes.ticket():
            raise OSError
    except OSError:
        pass
    with lanes.ticket() as ticket, lanes.taken(ticket, seconds):
        assert lanes.idle == 2
    assert seconds.waiting_for_shard > 0
