"""Files appear all at once or not at all."""

from pathlib import Path

import pytest

from flatkern.experiments.errors import UserError
from flatkern.experiments.output import staged


def test_a_new_folder_appears_at_the_end_only(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with staged(output) as folder:
        (folder / "a").write_text("1")
        assert not output.exists()
    assert (output / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def write_then_raise(output: Path, error: type[BaseException]) -> None:
    with staged(output) as folder:
        (folder / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_then_raise(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_keeps_its_other_files(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("keep")
    (output / "a").write_text("old")
    with pytest.raises(RuntimeError):
        write_then_raise(output, RuntimeError)
    assert (output / "a").read_text() == "old"
    with staged(output) as folder:
        (folder / "a").write_text("new")
    assert {p.name: p.read_text() for p in output.iterdir()} == {"mine": "keep", "a": "new"}


def test_impossible_places_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "none" / "out"):
        with pytest.raises(UserError, match=str(bad)), staged(bad):
            pytest.fail("the work must not start")
