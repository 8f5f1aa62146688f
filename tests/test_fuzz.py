import pytest

from tests.support.confined import confined
from tests.tools.fuzz import DOORS, fuzz


@pytest.mark.slow
def test_damaged_files_of_every_kind_end_in_a_result_or_an_error_of_ours(tmp_path):
    confined(len, b"")  # until the fork server stands
    for door in DOORS:
        counts, _, findings = fuzz(door, 0.8, 3, tmp_path)
        assert findings == []
        assert counts
