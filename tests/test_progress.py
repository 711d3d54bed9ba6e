"""What long work says of itself where nobody sees a bar."""

import pytest

from emadapt import progress


def test_a_log_gets_lines_with_what_is_done_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert list(progress.track("abcd", "work", 4)) == list("abcd")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"work: {n} of 4" for n in (1, 2, 3, 4)]
    assert all(line.endswith("minutes left") for line in lines)


def test_nothing_is_said_of_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track("abc", "work", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
