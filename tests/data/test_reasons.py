"""Every reason that a row can be quarantined for has a meaning, and no meaning is left over."""

import ast
from pathlib import Path

from tasks.data import reasons

GIVERS = {"BadRow": 0, "Rejected": 2}
"""Which argument of these calls is the reason."""


def reasons_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    given = [
        call.args[GIVERS[call.func.id]]
        for call in calls
        if call.func.id in GIVERS and len(call.args) > GIVERS[call.func.id]
    ]
    returned = [  # an objection: a reason and a sentence
        node.value.elts[0]
        for node in ast.walk(tree)
        if path.name == "answers.py" and isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    ]
    return {node.value for node in [*given, *returned] if isinstance(node, ast.Constant) and node.value}


def test_every_reason_in_the_code_has_a_meaning() -> None:
    found = set().union(*map(reasons_in, Path(reasons.__file__).parent.glob("*.py")))
    assert len(found) > 20
    assert found <= reasons.REASONS.keys()
    # These two are chosen by what was found, and so are no words in a call.
    assert reasons.REASONS.keys() - found == {"empty_answer", "empty_prompt", "duplicate", "near_duplicate"} - found
