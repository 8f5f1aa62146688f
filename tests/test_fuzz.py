from tests.fuzz import DOORS, fuzz


def test_damaged_files_of_every_kind_end_in_a_result_or_an_error_of_ours(tmp_path):
    for door in DOORS:
        counts, _, findings = fuzz(door, 1, 3, tmp_path)
        assert findings == []
        assert counts.total() > 5
