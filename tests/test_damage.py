"""Files that are not as they were written: every fault is named or harmless. `python -m tests.damage` does it a thousand times."""

import collections

import pytest
from damage import measure

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_every_fault_is_named_or_harmless():
    total = sum(measure(120, seed=1).values(), collections.Counter())
    assert set(total) <= {"named", "harmless"}, total
    assert total["named"] > 60
