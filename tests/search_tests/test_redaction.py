"""Passwords in the addresses of databases and servers are never shown."""

import pytest

from search.redaction import redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://hyq:secret@db/hyq", "postgresql://hyq:***@db/hyq"),
        (
            "postgresql+psycopg://hyq:s3:cr3t@db:5432/hyq gave 'no'",
            "postgresql+psycopg://hyq:***@db:5432/hyq gave 'no'",
        ),
        ("mysql://u:p@ss@h/d and http://a:b@c:5000", "mysql://u:***@h/d and http://a:***@c:5000"),
        (
            "postgresql://db/hyq?user=hyq&password=secret&sslmode=require",
            "postgresql://db/hyq?user=hyq&password=***&sslmode=require",
        ),
        ("postgresql://hyq:se/cr@t@db/hyq", "postgresql://hyq:***@db/hyq"),
        (
            "mysql://db/h?ssl_key_password=s3&api_key=s4&charset=utf8",
            "mysql://db/h?ssl_key_password=***&api_key=***&charset=utf8",
        ),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////work/optuna.db", "sqlite:////work/optuna.db"),
    ],
)
def test_only_passwords_are_hidden(text, shown):
    assert redacted(text) == shown
