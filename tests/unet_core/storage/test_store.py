import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from unet_core.errors import StoreError
from unet_core.storage.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path / "root") if request.param == "local" else "memory://root")


def test_published_files_are_whole_replaced_and_listed(store):
    store.publish("a/one", b"first")
    store.publish("a/one", io.BytesIO(b"second"))
    store.publish("b", b"x" * 10)
    assert store.read("a/one") == b"second"
    assert [(entry.name, entry.bytes) for entry in store.list()] == [("a/one", 6), ("b", 10)]
    store.remove("b")
    store.remove("b")
    assert not store.exists("b")
    store.remove("a/one")


def test_a_whole_folder_can_be_removed(store):
    store.publish("a/one", b"first")
    store.publish("b", b"second")
    store.remove_all()
    store.remove_all()
    assert store.list() == []
    assert not store.exists("a")


def test_an_exclusive_publication_has_one_winner(tmp_path):
    store = Store(str(tmp_path))
    for attempt in range(20):
        barrier = threading.Barrier(8)

        def publish(number, name=f"commit{attempt}", barrier=barrier):
            barrier.wait()
            return store.publish_exclusively(name, str(number).encode())

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(publish, range(8)))
        assert sum(won) == 1
        assert store.read(f"commit{attempt}") == str(won.index(True)).encode()
    assert len(store.list()) == 20  # no temporary file is left


def test_a_source_that_breaks_publishes_nothing(tmp_path):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(28, "No space left on device")

    store = Store(str(tmp_path))
    with pytest.raises(StoreError, match=r"cannot write .*part: No space left on device"):
        store.publish("part", Broken(b"data"))
    assert store.list() == []


def test_a_file_where_a_folder_should_be_is_told(tmp_path):
    (tmp_path / "out.tar").write_bytes(b"")
    store = Store(str(tmp_path / "out.tar"))
    for publish in (store.publish, store.publish_exclusively):
        with pytest.raises(StoreError, match=r"cannot write .*part: .*out\.tar is a file"):
            publish("part", b"data")


def test_what_is_missing_is_told_by_path(store):
    assert store.list("nothing") == []
    with pytest.raises(
        StoreError, match=r"cannot read .*nothing: there is no such file, folder or bucket"
    ):
        store.read("nothing")
    with pytest.raises(StoreError, match="no such file"):
        Store(store.uri("nothing")).read("", 0, 8)


def test_a_listing_is_whole_while_files_come_and_go(tmp_path):
    store = Store(str(tmp_path))
    for number in range(50):
        store.publish(f"part-{number}", b"x")
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            store.publish("busy", b"y")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(50):
            names = {entry.name for entry in store.list()}
            assert sum(name.startswith("part-") for name in names) == 50
    finally:
        stop.set()
        thread.join()


def test_hidden_files_are_not_listed_and_linked_folders_are_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    (tmp_path / "real" / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    assert len(Store(str(tmp_path)).list()) == 1
