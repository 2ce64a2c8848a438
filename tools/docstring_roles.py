"""Sphinx roles in docstrings as Markdown, for the documentation site (a griffe extension)."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?\.?([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """Replaces ``:class:`CAME``` by the name in code style."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object before it is parsed."""
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
