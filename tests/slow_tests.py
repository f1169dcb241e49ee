"""Writes tests/slow_tests.txt: the tests that `make test-fast` leaves out because they take longer than others.

make test-all PYTEST_ARGS=--junitxml=times.xml && python tests/slow_tests.py times.xml [SECONDS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

# Whole files: the first of their tests trains what all of them look at.
WHOLE = (
    "test_cross_validate.py", "test_embed.py", "test_evaluate.py", "test_evaluate_har.py", "test_evaluate_tasks.py",
    "test_extract_features.py", "test_families.py", "test_multitask.py", "test_text_families.py", "test_text_targets.py",
)  # fmt: skip

if __name__ == "__main__":
    limit = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    cases = ElementTree.parse(sys.argv[1]).iter("testcase")
    slow = {
        f"{case.get('classname').rpartition('.')[2]}.py::{case.get('name')}"
        for case in cases
        if float(case.get("time")) > limit and f"{case.get('classname').rpartition('.')[2]}.py" not in WHOLE
    }
    Path(__file__).with_name("slow_tests.txt").write_text("\n".join(sorted({*WHOLE, *slow})) + "\n")
    print(f"{len(slow)} tests take more than {limit:g} s")
