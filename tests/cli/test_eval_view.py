from __future__ import annotations

from luthier.cli.eval import EvalConfig
from luthier.cli.eval_view import solved_tables
from luthier.tasks.task import Problem, Task


def test_rows_by_two_fields(tmp_path) -> None:
    places = [(64, 0.0), (64, 1.0), (64, 0.0), (128, 0.0)]
    problems = [
        Problem(id=str(n), prompt="?", answer="1", metadata={"length": length, "depth": depth})
        for n, (length, depth) in enumerate(places)
    ]
    rows = [
        {"problem": p.id, "status": s, "first_status": s}
        for p, s in zip(problems, ["correct", "wrong"] * 2, strict=True)
    ]
    config = EvalConfig(model="m", tasks=("t",), out=tmp_path, by="length,depth")
    _, table = solved_tables(Task("t", problems), {"cot": rows}, {}, config)
    assert table["columns"][:4] == ["length", "depth", "method", "correct"]
    assert [row[:4] for row in table["rows"]] == [
        ["64", "0.0", "cot", "1.000"],
        ["64", "1.0", "cot", "0.000"],
        ["128", "0.0", "cot", "0.000"],
    ]
