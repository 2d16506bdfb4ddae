"""Griffe extension: ``:func:`~a.b.c``` and its relatives in docstrings become links where the page has the object."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(?P<short>~?)(?P<path>[\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the roles of one docstring."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda found: _link(found, obj), obj.docstring.value)


def _link(found: re.Match[str], obj: griffe.Object) -> str:
    path = found["path"]
    shown = path.rsplit(".", 1)[-1] if found["short"] else path
    if "." not in path:
        path = f"{obj.module.path}.{path}"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
