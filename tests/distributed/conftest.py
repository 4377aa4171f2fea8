"""Fixtures that tests of several ranks or hosts share."""

from collections.abc import Iterator

import pytest
from two_hosts import Host, NoHosts, running_hosts


@pytest.fixture
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one cable; skipped where the machine cannot make them."""
    try:
        with running_hosts() as hosts:
            yield hosts
    except NoHosts as reason:
        pytest.skip(str(reason))
