"""Every error the guard raises on purpose, with a one-line message.

A message says what is wrong, then what would be right. The tree:

    GuardError
    ├── PolicyError        the policy file cannot be used as it is
    ├── SaeError           an SAE file cannot be used, or is not the one it claims
    ├── CalibrationError   a calibration does not fit what it is to judge
    ├── PromptError        a file of prompts cannot be read
    ├── DrillError         a stored edit of a fire drill cannot be used
    ├── CertificateError   a policy cannot be certified, or a certificate be trusted
    ├── RequestError       a client asked for what it may not have
    └── EngineError        an engine, or an option of it, the guard cannot work on
"""

from typing import Literal

__all__ = [
    "CalibrationError",
    "CertificateError",
    "DrillError",
    "EngineError",
    "GuardError",
    "PolicyError",
    "PromptError",
    "RequestError",
    "SaeError",
    "as_line",
]


_MAX_CHARS = 800
"""Of a message: names and values in it may be a stranger's, and so may their length."""


def as_line(text: str) -> str:
    """Return text without what would steer a terminal, split a log or fill it."""
    text = " ".join(text.split())
    text = text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class GuardError(Exception):
    """What the guard refuses to do, in one line for whoever can mend it."""

    def __str__(self) -> str:
        """Return the line, whatever names stand in it."""
        return as_line(super().__str__())


class PolicyError(GuardError):
    """A policy file that cannot be used as it is."""


class SaeError(GuardError):
    """An SAE file that cannot be used, or is not the one it claims to be."""


class CalibrationError(GuardError):
    """A calibration that does not fit the SAE, the model or the score."""


class PromptError(GuardError):
    """A file of prompts that is missing or malformed."""


class DrillError(GuardError):
    """A stored edit of a fire drill that is damaged or fits something else."""


class CertificateError(GuardError):
    """A policy that cannot be certified, or a certificate that cannot be trusted."""


class RequestError(GuardError):
    """A request that is malformed (400), not allowed (403) or one too many (503)."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: Literal[400, 403, 503] = 400,
    ) -> None:
        """Keep the message together with what the HTTP answer needs.

        Args:
            message: One line: what is wrong; what would be right.
            param: The request field at fault, as OpenAI's `error.param` names it.
            status: 400 for malformed, 403 for not allowed, 503 for one too many.
        """
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


class EngineError(GuardError):
    """An engine, or an option of it, that the guard cannot work on."""
