"""Names of joined workers: other workers hand back, blame and sample by them."""

from search.joining import _crew


def test_two_workers_of_a_host_have_two_names_also_if_their_stores_differ(tmp_path):
    with (
        _crew(tmp_path / "a", "s") as first,
        _crew(tmp_path / "a", "s") as second,
        _crew(tmp_path / "b", "s") as elsewhere,
    ):
        assert len({first, second, elsewhere}) == 3
    with _crew(tmp_path / "a", "s") as again:
        assert again == first


def test_two_hosts_of_one_name_give_two_names(tmp_path, monkeypatch):
    with _crew(tmp_path, "s") as here:
        pass
    monkeypatch.setattr("search.processes._kernel", lambda: "another boot")
    with _crew(tmp_path, "s") as there:
        assert there != here
