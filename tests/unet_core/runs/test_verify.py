import pytest

from jobs.predict import predict
from tests.support.data import write_tars
from tests.support.harm import HARM
from unet_core.errors import StoreError
from unet_core.runs.verify import verify


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


@pytest.mark.parametrize(("harm", "found"), [(harm, words) for harm, _, words in HARM if words])
def test_whatever_is_off_is_found(run, harm, found):
    harm(run)
    problems = verify(str(run), deep=True).problems
    assert any(found in problem for problem in problems), problems


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"not a run folder: it has no run\.json"):
        verify(str(tmp_path))
