"""Which hosts talk to which, and when."""

import pytest

from ardiff.preflight.network import rounds


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8, 9, 64])
def test_every_host_has_two_neighbours_and_one_partner_at_a_time(hosts):
    found = rounds(hosts)
    assert len(found) == (1 if hosts == 2 else 2 + hosts % 2)
    for pairs in found:
        partners = [host for pair in pairs for host in pair]
        assert len(partners) == len(set(partners))
    every = [frozenset(pair) for pairs in found for pair in pairs]
    assert len(every) == len(set(every)) == (1 if hosts == 2 else hosts)
    neighbours = [sum(host in pair for pair in every) for host in range(hosts)]
    assert neighbours == [1 if hosts == 2 else 2] * hosts


def test_one_host_has_no_links():
    assert rounds(1) == []
