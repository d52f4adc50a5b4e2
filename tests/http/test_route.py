import importlib.util
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from guard.http.route import GUARDED, decide_route, route_path

PASSED = {
    # Nothing of the model's text, scores or vectors.
    *("/health", "/load", "/version", "/ping", "/v1/models", "/server_info"),
    *("/tokenize", "/detokenize", "/tokenizer_info", "/weight_info", "/docs"),
    *("/kv_event_sources", "/get_world_size", "/static", "/ready", "/readyz"),
    # Control that leaves the model as it is.
    *("/is_paused", "/is_sleeping"),
    *("/start_profile", "/stop_profile", "/is_scaling_elastic_ep"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
}
REFUSED = {
    *("/v1/responses", "/v1/responses/abc", "/v1/responses/abc/cancel"),
    *("/v1/responses/render", "/v1/messages", "/v1/messages/count_tokens"),
    *("/v1/messages/render", "/v1/chat/completions/batch", "/cohere/v2/chat"),
    *("/v1/chat/completions/render", "/v1/chat/completions/derender"),
    *("/v1/completions/render", "/v1/completions/derender"),
    *("/cohere/v2/chat/render", "/v1/systemone", "/generative_scoring"),
    *("/inference/v1/generate", "/inference/v1/abort_requests", "/invocations"),
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"),
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score"),
    *("/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
    *("/start_weight_update", "/start_draft_weight_update", "/update_weights"),
    *("/finish_weight_update", "/update_weight_version", "/weight_checker"),
    *("/pause", "/resume", "/abort_requests"),
    *("/fault_tolerance/apply", "/fault_tolerance/status"),
    *("/scale_elastic_ep", "/sleep", "/wake_up", "/release_kv_cache_memory"),
}


@pytest.mark.parametrize("path", sorted(GUARDED))
def test_the_two_routes_are_guarded_for_post(path):
    assert decide_route(path, "POST") == GUARDED[path]
    assert decide_route(path, "GET") == "pass"


@pytest.mark.parametrize("path", sorted(REFUSED))
@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
def test_what_the_guard_cannot_cover_is_refused(path, method):
    assert decide_route(path, method) == "refuse"


@pytest.mark.parametrize("path", sorted(PASSED))
def test_everything_else_is_passed_on(path):
    assert decide_route(path, "POST") == "pass"


@pytest.mark.parametrize(
    "path", ["/scores", "/v1/responsesx", "/guard/ready", "/metrics"]
)
def test_a_name_that_only_begins_like_a_refused_one_is_passed_on(path):
    assert decide_route(path, "GET") == "pass"


def test_a_preflight_of_a_browser_is_passed_on():
    assert decide_route("/v1/responses", "OPTIONS") == "pass"


PATHS = [
    *("/v1/chat/completions", "/v1/chat/completions\n", "/v1/responses\n"),
    *("/root/v1/chat/completions", "/root/v1/responses", "/v1/responses"),
]


class Endpoint:
    def __init__(self, name, served):
        self.name = name
        self.served = served

    async def __call__(self, scope, receive, send):
        self.served.append(self.name)


async def find_route(path, root_path):
    """Return the route that Starlette serves, or None."""
    served = []
    names = ("/v1/chat/completions", "/v1/responses")
    app = Starlette(routes=[Route(name, Endpoint(name, served)) for name in names])
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    scope |= {"root_path": root_path, "query_string": b"", "server": ("guard", 80)}

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    await app(scope, receive, send)
    return served[0] if served else None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("root_path", ["", "/root"])
@pytest.mark.anyio
async def test_whatever_a_router_would_serve_is_decided_as_that_route(path, root_path):
    served = await find_route(path, root_path)
    assert (served is not None) == (root_path != "" or not path.startswith("/root"))
    decided = decide_route(route_path(path, root_path), "POST")
    expected = {"/v1/chat/completions": "chat", "/v1/responses": "refuse"}
    assert decided == expected.get(served, "pass")


def test_every_route_of_the_installed_vllm_has_a_decision():
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    pattern = re.compile(
        r"\.(?:get|post|put|delete|websocket|add_api_route|mount)\(\s*\"(/[^\"]*)\""
    )
    folder = Path(spec.origin).parent / "entrypoints"
    routes = {
        route.replace("{response_id}", "abc")
        for file in folder.rglob("*.py")
        for route in pattern.findall(file.read_text())
    }
    assert len(routes) > 30
    assert routes - PASSED - REFUSED - GUARDED.keys() == set()
