"""Tools around a run: doctor, plan and cost, bench, pack, describe."""
