"""A few changed files of every kind; `make fuzz` reads thousands."""

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = ["checkpoint", "resumed", "compact", "prune.json", "study", "config.json", "summary.json", "log.csv", "image"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return fuzz.Kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_file_is_read_or_refused_in_one_line(kinds, name, data):
    fuzz.one_example(kinds, name, data.draw)
