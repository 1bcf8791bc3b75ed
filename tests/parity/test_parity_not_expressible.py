"""What no option expresses is listed, not left out: each entry is a skipped test with its reason."""

import pytest

from tests.parity import recurrent_rows, softmax_rows
from tests.parity.not_expressible import NOT_EXPRESSIBLE


@pytest.mark.parametrize("name", NOT_EXPRESSIBLE)
def test_not_expressible(name):
    pytest.skip(NOT_EXPRESSIBLE[name])


def test_rows_that_reasons_name_exist():
    rows = softmax_rows.PEERS | recurrent_rows.PEERS
    named = {
        word.strip("()").split(" ")[0]
        for reason in NOT_EXPRESSIBLE.values()
        for word in reason.split("the row ")[1:]
    }
    assert named and named <= rows.keys(), named - rows.keys()
