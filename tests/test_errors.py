from __future__ import annotations

from toolkit.errors import ToolkitError, unknown_name


def test_an_error_says_problem_found_and_fix() -> None:
    error = ToolkitError("the file is empty", found="a.pt: 0 bytes", fix="copy it again")
    words = "the file is empty found: a.pt: 0 bytes fix: copy it again"
    assert " ".join(str(error).split()) == words
    assert (error.problem, error.found, error.fix) == ("the file is empty", "a.pt: 0 bytes", "copy it again")


def test_an_unknown_name_lists_the_choices_and_the_nearest() -> None:
    error = unknown_name("attack", "pdg", ["square", "pgd", "apgd"])
    assert (error.problem, error.found) == ("unknown attack", "'pdg'")
    assert error.fix == "did you mean 'pgd'? choose one of: apgd, pgd, square"


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert unknown_name("attack", "zzzz", ["square", "pgd"]).fix == "choose one of: pgd, square"
