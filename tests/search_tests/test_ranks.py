"""What the ranks of a slot need of the study's database."""

import pytest
import sqlalchemy

from search.order import WorkOrder
from search.ranks import _stored


@pytest.fixture
def connections():
    """The connections to databases that are open, whoever opened them from now on."""
    held: set[int] = set()

    def opened(connection, record):
        held.add(id(connection))

    def closed(connection, record):
        held.discard(id(connection))

    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "connect", opened)
    sqlalchemy.event.listen(sqlalchemy.pool.Pool, "close", closed)
    yield held
    sqlalchemy.event.remove(sqlalchemy.pool.Pool, "connect", opened)
    sqlalchemy.event.remove(sqlalchemy.pool.Pool, "close", closed)


def test_a_rank_that_has_read_what_the_study_is_holds_no_connection(stored_store, small_study, connections):
    """Each rank reads it, and PostgreSQL has 100 connections by default."""
    order = WorkOrder(
        store=stored_store, url=None, study="demo", slot=0, first_trial=0, deadline=None, until_trial=None
    )

    config, prompts = _stored(order)

    assert connections == set()
    assert config.name == small_study.name
    assert prompts.search == ("a blue square", "a green ring")
