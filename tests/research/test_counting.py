"""The table of the code's size counts as it says."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))

import count_code


def test_docstrings_and_self_do_not_count():
    tree = ast.parse(
        'class A:\n    def method(self, a, *rest, b=1):\n        """One.\n\n        Two.\n        """\n        return a'
    )
    assert list(count_code.functions_in(tree)) == [(2, 3)]


def test_a_folder_is_one_row(tmp_path):
    (tmp_path / "one.py").write_text("def f(a, b):\n    return a\n")
    (tmp_path / "two.py").write_text("X = 1\n" * 10)
    row = count_code.count(tmp_path)
    assert (row["files"], row["lines"], row["longest"], row["median fn"], row["most params"]) == (2, 12, 10, 2, 2)
    with pytest.raises(ValueError, match="no Python file"):
        count_code.count(tmp_path / "nothing")
