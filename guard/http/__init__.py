"""The HTTP face of the guard: pure ASGI, and no engine.

`GuardMiddleware` stands before an OpenAI-compatible application. It reads the
`guard` field of a request, sends a signed ticket along, and writes the verdict
into the answer. `Desk` is what it asks; `PolicyDesk` is the plain desk.
"""

from guard.http.desk import Admission, Desk, PolicyDesk
from guard.http.middleware import GuardMiddleware

__all__ = ["Admission", "Desk", "GuardMiddleware", "PolicyDesk"]
