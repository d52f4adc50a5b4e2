"""A client of a running guarded server, for the commands that need one."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from typing import Annotated, Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import EngineError
from guard.prompt import Prompt
from guard.traffic import Told

__all__ = ["Client", "Model", "Said", "Status", "ask_for"]

_Kind = TypeVar("_Kind", bound="Said")

_AT_ONCE = 16
"""Requests that are under way at once."""
_SECONDS = 600
_MAX_BYTES = 64 << 20
"""Of an answer: who answers may be anybody."""


class Said(BaseModel):
    """Part of an answer; another version of the server may say more."""

    model_config = ConfigDict(frozen=True)


class Certified(Said):
    """The certificate of a policy."""

    id: str


class ServedPolicy(Said):
    """What identifies a policy."""

    mode: str
    fingerprint: str
    certificate: Certified | None = None


class Reloaded(Said):
    """The last reload."""

    result: str
    at: Annotated[float, Field(ge=0, lt=2**32)]
    """In seconds since 1970."""
    reason: str | None = None


class Status(Said):
    """What is read of `/guard/status`."""

    version: str
    generation: int
    fingerprint: str
    on_error: str = "closed"
    policies: dict[str, ServedPolicy] = {}
    """Those that the key may name."""
    last_reload: Reloaded | None = None


class Model(Said):
    """A model that is served."""

    id: str
    max_model_len: Annotated[int, Field(gt=0)] | None = None
    """Most tokens of a request; only vLLM says it."""


class _Models(Said):
    data: Annotated[tuple[Model, ...], Field(min_length=1)]


class Client:
    """Talks to a server by URL, as any OpenAI client would."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        policy: str = "",
        admin_token: str = "",
        patience: float = _SECONDS,
    ) -> None:
        """Know the server; nothing is asked yet.

        Args:
            url: Of the server, without /v1.
            api_key: Where the server checks keys.
            policy: The policy that requests run under; the server's choice without.
            admin_token: As the server has it in its environment.
            patience: Seconds that nothing may come for.
        """
        self._patience = patience
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        if admin_token:
            self._headers["x-guard-admin-token"] = admin_token
        self._policy = {"policy": policy} if policy else {}

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of an answer; a body makes it a POST.

        Raises:
            EngineError: The server cannot be reached, or refuses; its words are kept.
        """
        try:
            return json.loads(self.fetch(path, body))
        except (ValueError, RecursionError) as error:
            message = f"{self._url} does not answer as a guarded server: {error}."
            raise EngineError(message) from error

    def fetch(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """Return an answer as it comes; otherwise like `call`."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, self._headers)
            with urllib.request.urlopen(request, timeout=self._patience) as answer:
                content = bytes(answer.read(_MAX_BYTES + 1))
                if answer.length and len(content) <= _MAX_BYTES:
                    raise IncompleteRead(content, answer.length)
        except urllib.error.HTTPError as error:
            message = f"{self._url}{path} answered {error.code}: {_words(error)}"
            raise EngineError(message) from error
        except ValueError as error:
            # Whose own words would hold the headers, and with them the token.
            message = (
                f"{self._url} does not answer as a guarded server; expected a URL such "
                "as http://localhost:8000, and a token and a key that fit a header."
            )
            raise EngineError(message) from error
        except (OSError, HTTPException) as error:
            message = f"{self._url} does not answer as a guarded server: {error}."
            raise EngineError(message) from error
        if len(content) > _MAX_BYTES:
            message = (
                f"{self._url}{path} answers without an end; expected at most "
                f"{_MAX_BYTES >> 20} MiB."
            )
            raise EngineError(message)
        return content

    def read(
        self,
        kind: type[_Kind],
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        missing: str,
    ) -> _Kind:
        """Return what an answer says; otherwise like `call`.

        Args:
            kind: What is read of it.
            path: Of the route.
            body: Makes it a POST.
            missing: What is wrong with a server that says something else, and what
                would be right.
        """
        said = self.call(path, body)
        try:
            return kind.model_validate(said)
        except ValidationError as error:
            raise EngineError(f"{self._url} {missing}") from error

    def read_status(self) -> Status:
        """Return what `/guard/status` says; otherwise like `call`."""
        missing = "has no guard status; expected a guarded server."
        return self.read(Status, "/guard/status", missing=missing)

    def read_model(self) -> Model:
        """Return the first model that is served; otherwise like `call`."""
        missing = "names no model; expected an OpenAI-compatible one."
        return self.read(_Models, "/v1/models", missing=missing).data[0]

    def read_metrics(self) -> list[Sample]:
        """Return the guard's own samples of `/metrics`; otherwise like `call`."""
        text = self.fetch("/metrics").decode(errors="replace")
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            message = f"{self._url}/metrics holds no metrics; expected Prometheus's."
            raise EngineError(message) from error
        samples = (sample for family in families for sample in family.samples)
        return [sample for sample in samples if sample.name.startswith("guard_")]

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Told]:
        """Answer prompts greedily and yield what the guard told of each, in order.

        Raises:
            EngineError: The server cannot be reached, refuses, or has no guard; or
                replicas behind it run different versions of the policy; or a prompt
                comes with a response, which only an engine of one's own takes.
        """
        if any(prompt.response is not None for prompt in prompts):
            message = (
                "A prompt has a 'response', but a server answers by itself; expected "
                "prompts alone."
            )
            raise EngineError(message)
        model = self.read_model()
        if model.max_model_len is None:
            message = f"{self._url} does not say max_model_len; expected vLLM."
            raise EngineError(message)
        most = model.max_model_len
        versions: set[str] = set()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for version, told in pool.map(
                    lambda prompt: self._ask(model.id, most, prompt), prompts
                ):
                    versions.add(version)
                    self._check_one(versions)
                    yield told
            finally:
                pool.shutdown(cancel_futures=True)

    def _check_one(self, versions: Collection[str]) -> None:
        if len(versions) > 1:
            found = " and ".join(sorted(version[:12] for version in versions))
            message = (
                f"{self._url} answers under several versions of the policy, {found}; "
                "expected one: are replicas behind it under different files?"
            )
            raise EngineError(message)

    def _ask(self, model: str, most: int, prompt: Prompt) -> tuple[str, Told]:
        """Return which version of the policy answered, and what it told."""
        guard = {**self._policy, "trace": "summary"}
        answer = self.call(*ask_for(model, prompt, guard=guard))
        try:
            verdict = answer["guard"]
            total = int(answer["usage"]["prompt_tokens"]) + prompt.max_tokens
            told = Told.of(verdict, min(total, most))
            return str(verdict["fingerprint"]), told
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            message = (
                f"{self._url} answers without a verdict; expected a guarded server."
            )
            raise EngineError(message) from error


def ask_for(
    model: str, prompt: Prompt, *, guard: Mapping[str, str]
) -> tuple[str, dict[str, Any]]:
    """Return route and body of a request for a greedy answer.

    Args:
        model: As the server calls it.
        prompt: What is asked; raw text goes without a chat template.
        guard: What is asked of the guard.
    """
    body: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "max_tokens": prompt.max_tokens,
        "guard": dict(guard),
    }
    if prompt.text is not None:
        return "/v1/completions", {**body, "prompt": prompt.text}
    return "/v1/chat/completions", {**body, "messages": prompt.conversation}


def _words(error: urllib.error.HTTPError) -> str:
    """Return what a server says of an error, in one line."""
    text = ""
    with contextlib.suppress(OSError, HTTPException):
        text = error.read(2000).decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        said = json.loads(text)
        text = said["reason"] if "reason" in said else said["error"]["message"]
    return " ".join(str(text).split())
