from __future__ import annotations

import pytest

from luthier.report.tables import cell, column, compact, flatten, is_numeric, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1203411, "1,203,411"),
        (1.53124, "1.531"),
        (float("nan"), "nan"),
        ([1, None], "1, –"),
    ],
)
def test_cell(value: object, text: str) -> None:
    assert cell(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0003, "0.0003"),
        (9000, "9000"),
        (250_000, "250k"),
        (1_250_000, "1.25M"),
        (-2e9, "-2B"),
        (1e-17, "0"),
    ],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_floats_of_a_column_line_up() -> None:
    assert column([2.41, 1.53124, None, "x"]) == ["2.410", "1.531", "–", "x"]
    assert column([1e-9, 2.5]) == ["1e-09", "2.5"]


def test_numeric_columns_are_recognized() -> None:
    assert is_numeric(["2.05 [1.98, 2.12]", "–", "3"])
    assert is_numeric(["71 %", "±0.2", "1,200"])
    assert not is_numeric(["zstd", "3"])
    assert not is_numeric(["–"])


def test_table_escapes_and_fills_short_rows() -> None:
    text = table(["a", "b"], [["<b>", 1], ["x"]], title="T<", note="n<")
    assert "&lt;b&gt;" in text
    assert "T&lt;" in text
    assert "n&lt;" in text
    assert text.count("<td") == 4


def test_empty_table_says_so() -> None:
    assert "no rows" in table(["a"], [])


def test_flatten_keeps_empty_mappings() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_only_prose_may_wrap() -> None:
    text = table(["name", "value", "why"], [["a", 1, "x" * 41]])
    assert '<td>a</td><td class="n">1</td><td class="w">xxx' in text
