"""Set up and run the checks: python3 scripts/run_tests.py [options of pytest]."""

from __future__ import annotations

import sys

import environment


def main() -> None:
    """Format and lint, types, tests; with options, only pytest with them."""
    environment.ensure("[dev,train]")
    module = [environment.python(), "-m"]
    if len(sys.argv) == 1:
        environment.run([*module, "ruff", "check", "."])
        environment.run([*module, "ruff", "format", "--check", "."])
        environment.run([*module, "mypy"])
    environment.run([*module, "pytest", *sys.argv[1:]])


if __name__ == "__main__":
    main()
