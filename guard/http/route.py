"""Which of vLLM's routes the guard answers for.

Every route that can return text, scores or vectors of the model is either
guarded or refused; what would change the model under its calibration is
refused too. Whatever is not named here is passed on, and should it reach the
engine, it runs under the default policy, because tickets are checked there.
"""

from typing import Literal

__all__ = ["GUARDED", "REFUSED", "Decision", "Kind", "decide_route", "route_path"]

Kind = Literal["chat", "completion"]
"""The two shapes of answer that carry a verdict."""

Decision = Literal["chat", "completion", "refuse", "private", "pass"]
"""What happens to a request: guarded as one of two kinds, refused, passed on to whoever
has a key of the server, or left alone."""

GUARDED: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
}
"""Routes whose answers carry a verdict, for POST."""

_PRIVATE = frozenset({"/guard/drills", "/guard/reload", "/guard/status"})
"""Routes of the guard's own that name policies or drills; the engine's check of keys
does not cover them."""

REFUSED = (
    # Text of the model in another shape.
    "/v1/responses",
    "/v1/messages",
    "/v1/audio",
    "/v1/realtime",
    "/v1/systemone",
    "/cohere",
    "/generative_scoring",
    "/inference",
    "/invocations",
    # Vectors and scores of the model.
    "/v1/embeddings",
    "/v2/embed",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    # Whatever would change the model that the policy was calibrated on.
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/collective_rpc",
    "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_checker",
    "/scale_elastic_ep",
    "/sleep",
    "/release_kv_cache_memory",
    "/wake_up",
    # What would end or hold up the requests of others, and asks no key.
    "/abort_requests",
    "/fault_tolerance",
    "/pause",
    "/resume",
)
"""Routes refused with everything below them, for every method."""


def decide_route(path: str, method: str) -> Decision:
    """Decide about a request by its path inside the application.

    Args:
        path: As `route_path` gives it.
        method: HTTP method, upper case.
    """
    # A router's pattern ends in "$", which also matches before a last line feed.
    path = path.removesuffix("\n")
    kind = GUARDED.get(path)
    if kind is not None:
        return kind if method == "POST" else "pass"
    if method == "OPTIONS":
        return "pass"
    if path.removesuffix("/") in _PRIVATE:
        return "private"
    if any(_lies_below(path, tree) for tree in GUARDED):
        return "refuse"
    if any(path == tree or _lies_below(path, tree) for tree in REFUSED):
        return "refuse"
    return "pass"


def route_path(path: str, root_path: str) -> str:
    """Return the path that the application's router will look up.

    Args:
        path: `path` of the ASGI scope, decoded.
        root_path: `root_path` of the ASGI scope.
    """
    if root_path and path.startswith(root_path + "/"):
        return path[len(root_path) :]
    return path


def _lies_below(path: str, tree: str) -> bool:
    """Tell whether there is more than a closing slash, which only redirects."""
    return path.startswith(tree + "/") and len(path) > len(tree) + 1
