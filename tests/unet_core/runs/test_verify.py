import tarfile

import numpy as np
import pytest

from jobs.predict import predict
from tests.support.data import write_tar, write_tars
from tests.support.harm import HARM
from unet_core.errors import StoreError
from unet_core.runs.verify import verify
from unet_core.synthetic import nuclei, png


@pytest.fixture
def run(make_config, tmp_path):
    """A finished run over tars of its own."""
    predict(make_config(input={"uri": str(write_tars(tmp_path / "tars"))}))
    return tmp_path / "run"


def test_a_finished_run_is_verified_even_deeply(run):
    findings = verify(str(run), deep=True)
    assert findings.problems == []
    assert findings.notes == []
    assert findings.totals.images_seen == 12


def test_what_is_hidden_in_a_tar_is_not_missed(make_config, tmp_path):
    image = png(nuclei(64, 64, np.random.default_rng(0))[0])
    names = ("a.png", "./b/../c.png", ".d.png", "e/.ipynb_checkpoints/f.png", ".../g.png")
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "t.tar", dict.fromkeys(names, image))
    totals = predict(make_config(input={"uri": f"{tmp_path}/in", "masks": ""})).totals
    assert totals.images_seen == 2
    assert verify(str(tmp_path / "run"), deep=True).problems == []


@pytest.mark.parametrize("cut", [700, 1024 + 512 + 100, -1024])
def test_a_tar_that_is_cut_short_is_counted_as_it_is_read(make_config, tmp_path, cut):
    image = png(nuclei(64, 64, np.random.default_rng(0))[0])
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "t.tar", {"a.png": image, "b.png": image, "c.png": image})
    whole = (tmp_path / "in" / "t.tar").read_bytes()
    with tarfile.open(tmp_path / "in" / "t.tar", "a") as tar:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "in" / "u.tar").write_bytes(whole[:cut])
    source, errors = {"uri": f"{tmp_path}/in", "masks": ""}, {"max_failed_images": 9}
    predict(make_config(input=source, errors=errors))
    assert verify(str(tmp_path / "run"), deep=True).problems == []


@pytest.mark.parametrize(("harm", "found"), [(harm, words) for harm, _, words in HARM if words])
def test_whatever_is_off_is_found(run, harm, found):
    harm(run)
    problems = verify(str(run), deep=True).problems
    assert any(found in problem for problem in problems), problems


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"not a run folder: it has no run\.json"):
        verify(str(tmp_path))
