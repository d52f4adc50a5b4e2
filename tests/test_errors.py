"""The error tree."""

import pytest

from guard import errors


@pytest.mark.parametrize(
    "kind",
    ["PolicyError", "SaeError", "CalibrationError", "CertificateError", "EngineError"],
)
def test_every_error_can_be_caught_as_a_guard_error(kind: str) -> None:
    with pytest.raises(errors.GuardError, match="what is wrong"):
        raise getattr(errors, kind)("what is wrong; what would be right")


def test_a_request_error_carries_what_the_http_answer_needs() -> None:
    error = errors.RequestError("No such policy", param="guard.policy", status=403)
    assert isinstance(error, errors.GuardError)
    assert (error.message, error.param, error.status) == (
        "No such policy",
        "guard.policy",
        403,
    )
    assert str(error) == "No such policy"


def test_a_request_error_is_a_400_about_no_field_unless_it_says_so() -> None:
    error = errors.RequestError("Malformed")
    assert (error.param, error.status) == (None, 400)


@pytest.mark.parametrize(
    "kind", [errors.GuardError, errors.PolicyError, errors.RequestError]
)
def test_a_message_is_a_line_to_read_whatever_names_are_in_it(
    kind: type[errors.GuardError],
) -> None:
    assert str(kind("a name\n\x1b[31m \ud800 \u202e é")) == (
        r"a name \x1b[31m \ud800 \u202e é"
    )
    assert len(str(kind("a" * 5000))) == 800
