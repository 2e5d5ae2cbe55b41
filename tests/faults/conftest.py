"""One corpus for all runs whose ranks are killed."""

import pytest

from tests.faults.harness import prepare_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("corpus"))
