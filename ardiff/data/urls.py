"""URLs of data sets: which are read, and how their credentials are kept out of everything that is shown or stored."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from ardiff.config import Config
from ardiff.credentials import hide_credentials
from ardiff.errors import UserError

# What fsspec knows beyond these, such as shells, ssh or archives within archives, is refused.
PROTOCOLS = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
IPV6_HOST = re.compile(r"(?:[^/@]*@)?\[[0-9A-Fa-f:.]+\](?::\d+)?(?=/|$)")
AUTHORITY = re.compile(r"(?P<protocol>\w+)://(?:(?P<user>[^/?\s]*)@)?(?P<rest>[^?]*)(?P<query>\?.*)?")


class Credentials(NamedTuple):
    """What a URL may hold besides the place: "user:password@" and "?query"."""

    user: str = ""
    query: str = ""

    def added_to(self, url: str) -> str:
        """The URL with which a store is asked."""
        protocol, _, rest = url.partition("://")
        return f"{protocol}://{self.user}{rest}{self.query}"


def is_remote(source: str) -> bool:
    """Whether a data set is named by a URL. Raises UserError for a kind of URL that is not read."""
    protocol, separator, rest = source.partition("://")
    chained = "::" in IPV6_HOST.sub("", rest, count=1)  # fsspec's way to name a file system within another one
    if source.startswith("pipe:") or (separator and (protocol not in PROTOCOLS or chained)):
        shown = split_credentials(source)[0]
        raise UserError(f"{shown}: shards are read from folders or from {', '.join(PROTOCOLS[:-1])} URLs only")
    return bool(separator and rest)


def split_credentials(url: str) -> tuple[str, Credentials]:
    """A URL without user, password and query (signatures and tokens are there), and these."""
    found = AUTHORITY.fullmatch(url)
    if found is None:
        return url, Credentials()
    user = f"{found['user']}@" if found["user"] else ""
    # A user without a password is none with Azure, but a container: abfs://container@account/path
    secret = user if ":" in user or found["protocol"].startswith("http") else ""
    shown = f"{found['protocol']}://{user.removeprefix(secret)}{found['rest']}"
    return shown, Credentials(secret, found["query"] or "")


def without_credentials(config: Config) -> Config:
    """A configuration as it may be stored and shown: its data sets are named by their places alone."""
    data = config.data
    mixture = [replace(source, shards=split_credentials(source.shards)[0]) for source in data.mixture]
    shards, validation = (url and split_credentials(url)[0] for url in (data.shards, data.validation))
    return replace(config, data=replace(data, shards=shards, validation=validation, mixture=mixture))


def redact(text: str, address: str = "") -> str:
    """What is said of the URL `address`, or of one that it was redirected to, without credentials."""
    user, query = split_credentials(address)[1]
    for secret in (query, user, user[:-1].partition(":")[2]):
        text = text.replace(secret, "") if secret else text
    return hide_credentials(text)
