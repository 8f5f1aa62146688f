import tarfile

import pytest

from jobs.predict import predict
from jobs.tools.pack import pack
from tests.support.runs import masks_by_key
from unet_core.errors import ConfigError
from unet_core.runs.run import Run


@pytest.mark.parametrize(("kind", "masks"), [("webdataset", "mask.png"), ("parquet", "mask")])
def test_packed_images_give_the_masks_of_loose_ones(make_config, folder, tmp_path, kind, masks):
    loose = {"uri": str(folder / "images"), "masks": f"{folder}/masks"}
    config = make_config(out="packed", input=loose)
    size = sum(path.stat().st_size for path in (folder / "images").iterdir())
    packed = pack(config, kind, size // 4)
    assert (packed.images, packed.masks) == (12, 12)
    assert 4 <= packed.shards <= 5
    sizes = [path.stat().st_size for path in (tmp_path / "packed").iterdir()]
    assert max(sizes) < 0.7 * sum(sizes)
    again = pack(config, kind, size // 4)
    assert (again.shards, again.kept) == (0, packed.shards)
    predict(make_config(out="loose", input=loose))
    predict(make_config(out="run", input={"uri": str(tmp_path / "packed"), "masks": masks}))
    assert masks_by_key(Run(str(tmp_path / "run"))) == masks_by_key(Run(str(tmp_path / "loose")))


def test_a_list_of_several_places_is_packed_by_whole_paths(make_config, folder, tmp_path):
    uris = [f"{folder}/{kind}/cell00.png" for kind in ("images", "masks")]
    (tmp_path / "list.csv").write_text("\n".join(["uri", *uris]))
    allow = [f"{folder}/images", f"{folder}/masks"]
    source = {"uri": f"{tmp_path}/list.csv", "format": "list", "masks": "", "allow": allow}
    pack(make_config(out="packed", input=source), "webdataset", 10**9)
    (shard,) = (tmp_path / "packed").iterdir()
    with tarfile.open(shard) as tar:
        assert [name.rpartition("/cell00")[2] for name in tar.getnames()] == [".png", ".png"]
        assert not any(name.startswith("/") for name in tar.getnames())


def test_a_destination_with_other_shards_is_refused(make_config, folder, tmp_path):
    loose = {"uri": str(folder / "images"), "masks": f"{folder}/masks"}
    pack(make_config(out="packed", input=loose | {"masks": ""}), "webdataset", 10**6)
    with pytest.raises(ConfigError, match="is no shard of this input"):
        pack(make_config(out="packed", input=loose), "webdataset", 10**6)


def test_what_is_packed_or_would_lose_a_name_is_refused(make_config, tars, tmp_path):
    with pytest.raises(ConfigError, match="it is webdataset already"):
        pack(make_config(out="packed", input={"uri": str(tars)}), "parquet", 10**6)
    (tmp_path / "in").mkdir()
    for name in ("a.b.png", "a-b.png"):
        (tmp_path / "in" / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"a-b\.png and a\.b\.png would both be 'a-b'"):
        pack(make_config(out="packed", input={"uri": f"{tmp_path}/in", "masks": ""}), "parquet", 1)
