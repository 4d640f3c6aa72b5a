"""The families, one after the other, for every contract."""

import pytest

from tests.contracts.families import FAMILIES, Family


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]
