import pytest

from ardiff.config import differences, load, to_yaml
from ardiff.data.urls import is_remote, redact, split_credentials, without_credentials
from ardiff.errors import UserError


@pytest.mark.parametrize(
    ("url", "shown", "user", "query"),
    [
        ("https://host/a/b", "https://host/a/b", "", ""),
        ("https://me:pa@ss@host:8/a", "https://host:8/a", "me:pa@ss@", ""),
        ("https://token@host/a", "https://host/a", "token@", ""),
        ("https://host/a/x-{0..3}.tar?sig=a/b&se=1", "https://host/a/x-{0..3}.tar", "", "?sig=a/b&se=1"),
        ("s3://bucket/a", "s3://bucket/a", "", ""),
        ("s3://key:secret@bucket/a", "s3://bucket/a", "key:secret@", ""),
        ("abfs://container@account.net/a?sig=1", "abfs://container@account.net/a", "", "?sig=1"),
        ("hf://datasets/me/set@main/x", "hf://datasets/me/set@main/x", "", ""),
        ("http://me:x@[::1]:80/a", "http://[::1]:80/a", "me:x@", ""),
        ("/data/a@b?/x-{0..3}.tar", "/data/a@b?/x-{0..3}.tar", "", ""),
    ],
)
def test_credentials_are_split_off_and_put_back(url, shown, user, query):
    assert split_credentials(url) == (shown, (user, query))
    if is_remote(url):
        assert split_credentials(url)[1].added_to(shown) == url


@pytest.mark.parametrize("url", ["http://[::1]:8000/x", "https://[2001:db8::5]/a/b.tar", "http://u:p@[::1]/x"])
def test_ipv6_hosts_are_no_chains_of_file_systems(url):
    assert is_remote(url)


@pytest.mark.parametrize("url", ["http://a::s3://b/c", "http://[::1]/x::zip://a", "https://[zip::file]/x"])
def test_chains_of_file_systems_are_refused(url):
    with pytest.raises(UserError, match="shards are read from folders or from http"):
        is_remote(url)


def test_a_refused_url_is_shown_without_its_password():
    with pytest.raises(UserError) as caught:
        is_remote("ftp://me:hush@host/x?token=hush")
    assert "hush" not in str(caught.value) and "ftp://host/x" in str(caught.value)


def test_what_libraries_say_is_shown_without_credentials():
    said = "403, url='https://me:hush@host/x?X-Amz-Signature=hush&a=b' (see https://host/help?token=hush)"
    assert redact(said) == "403, url='https://host/x' (see https://host/help)"
    said = "not for me:hush, nor for hush, at /x?sig&se=1"
    assert redact(said, "https://me:hush@host/x?sig&se=1") == "not for me:, nor for , at /x"


@pytest.mark.parametrize(
    "data_set",
    [
        ["data.shards=https://me:hush@host/x?token=hush"],
        ["data.shards=/local", "data.validation=s3://key:hush@bucket/x"],
        ["data.mixture=[{shards: 'https://hush@host/x', weight: 2}, {shards: /local}]"],
    ],
)
def test_what_is_stored_of_a_configuration_has_no_credentials(data_set):
    config = load("tiny", data_set)
    stored = without_credentials(config)
    assert "hush" in to_yaml(config) and "hush" not in to_yaml(stored)
    assert stored == without_credentials(stored)
    changed = [line.partition(":")[0] for line in differences(config, stored)]
    assert changed == [data_set[-1].partition("=")[0]]


def test_a_configuration_without_urls_is_stored_as_it_is():
    config = load("tiny", ["data.shards=/data/a@b?/x-{0..3}.tar"])
    assert without_credentials(config) == config
    assert without_credentials(load("tiny")) == load("tiny")  # which names none
