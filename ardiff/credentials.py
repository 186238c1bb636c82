"""Passwords, tokens and signatures in URLs: what is shown or stored goes without them."""

from __future__ import annotations

import re

USER_IN_TEXT = re.compile(r"(?<=://)[^/\s'\"]*@")
QUERY_IN_TEXT = re.compile(r"\?[\w.~%+-]+=[^\s'\")>]*")


def hide_credentials(text: str) -> str:
    """A text without the users and queries of the URLs in it."""
    return QUERY_IN_TEXT.sub("", USER_IN_TEXT.sub("", text))
