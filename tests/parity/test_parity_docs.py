"""The page's tables are those of the recorded results."""

import json

from tests.parity import recurrent_rows, softmax_rows, table


def test_the_page_shows_the_recorded_results():
    results = json.loads(table.RESULTS.read_text("utf-8"))
    text = table.PAGE.read_text("utf-8")
    assert text == table.page(text, table.tables(results)), "run python -m tests.parity.table --write"


def test_the_results_have_a_row_for_every_layer():
    recorded = {row["name"] for row in json.loads(table.RESULTS.read_text("utf-8"))["rows"]}
    missing = (softmax_rows.PEERS.keys() | recurrent_rows.PEERS.keys()) - recorded
    assert not missing, f"{missing}: run make parity PARITY_JSON=docs/results/parity.json"
