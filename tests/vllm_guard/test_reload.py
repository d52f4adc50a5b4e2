"""What engine core and worker do with an offer, without an engine around them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_guard import context, reload, rollout
from vllm_guard.reload import Offer

from guard.fingerprint import file_fingerprint
from guard.policy import load_policy


class Engine:
    """An engine core whose ranks only say what they are told to."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(requests={})
        self.model_executor = self
        self.called: list[str] = []
        self.answers: list[str] = [""]

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.called.append(method)
        if method == "guard_stage":
            return self.answers
        if method == "guard_commit":
            reload._commit_rank(None, *args)
        if method == "guard_abandon":
            reload._abandon_rank(None)
        return []

    def stage(self, offer: Offer) -> dict[str, str]:
        return reload._stage(self, tuple(offer))

    def commit(self, owner: str = "me") -> None:
        reload._commit(self, owner, f"notice of {owner}")

    def follow(self, rank: int, seen: int, oldest: int) -> dict[str, Any]:
        return reload._follow(self, rank, seen, oldest)

    def begin(self, number: int) -> None:
        """Have a request in flight of a generation."""
        watched = SimpleNamespace(generation=SimpleNamespace(number=number))
        self.scheduler.requests["r"] = SimpleNamespace(guard=watched)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def make_offer(
    state: context.Context, write_policy: Callable[..., Path]
) -> Callable[..., Offer]:
    def make(number: int, owner: str = "me") -> Offer:
        path = write_policy(f"on_error: {('open', 'closed')[number % 2]}")
        return Offer(
            owner=owner,
            number=number,
            path=str(path),
            content=path.read_bytes(),
            fingerprint=file_fingerprint(load_policy(path)),
        )

    return make


def test_what_is_staged_is_not_current_before_it_is_committed(
    engine: Engine, state: context.Context, make_offer: Callable[..., Offer]
) -> None:
    offer = make_offer(2)
    assert engine.stage(offer) == {}
    assert state.current is state.start
    assert engine.follow(0, 0, 1)["notice"] == ""
    engine.commit()
    assert engine.follow(0, 1, 1)["notice"] == "notice of me"
    assert (state.current.number, state.current.fingerprint) == (2, offer.fingerprint)
    assert state.previous is state.start
    assert [state.find(n) and state.find(n).number for n in (None, 1, 2, 3)] == [
        *(2, 1, 2),
        None,
    ]


@pytest.mark.parametrize("answers", [["", "the disk is on fire"], ["no", ""]])
def test_one_rank_that_fails_stops_all_of_it(
    answers: list[str],
    engine: Engine,
    state: context.Context,
    make_offer: Callable[..., Offer],
) -> None:
    engine.answers = answers
    told = engine.stage(make_offer(2))
    assert told == {"error": "".join(answers)}
    assert engine.called == ["guard_stage", "guard_abandon"]
    assert state.staged is None
    with pytest.raises(Exception, match="Nothing of this reload is staged"):
        engine.commit()
    assert state.current is state.start
    engine.answers = ["", ""]
    assert engine.stage(make_offer(2)) == {}


def test_a_file_that_another_process_read_otherwise_is_refused(
    engine: Engine, make_offer: Callable[..., Offer]
) -> None:
    told = engine.stage(make_offer(2)._replace(fingerprint="0" * 64))
    assert "changed while it was read" in told["error"]


def test_two_attempts_do_not_mix(
    engine: Engine, state: context.Context, make_offer: Callable[..., Offer]
) -> None:
    assert engine.stage(make_offer(2)) == {}
    other = engine.stage(make_offer(2, owner="other"))
    assert other == {"busy": "another reload is under way"}
    reload._abandon(engine, "other")
    with pytest.raises(Exception, match="Nothing of this reload"):
        engine.commit("other")
    engine.commit()
    late = engine.stage(make_offer(2, owner="other"))
    assert late == {"busy": "another reload came first"}
    assert engine.stage(make_offer(3, owner="other")) == {}


def test_what_nobody_came_back_for_is_replaced(
    engine: Engine, state: context.Context, make_offer: Callable[..., Offer]
) -> None:
    assert engine.stage(make_offer(2)) == {}
    assert state.reloads is not None
    state.reloads.since -= 61
    assert engine.stage(make_offer(2, owner="other")) == {}
    with pytest.raises(Exception, match="Nothing of this reload"):
        engine.commit()


def test_a_third_generation_waits_for_requests_of_the_first(
    engine: Engine, state: context.Context, make_offer: Callable[..., Offer]
) -> None:
    engine.begin(1)
    assert engine.stage(make_offer(2)) == {}
    engine.commit()
    assert "still in flight" in engine.stage(make_offer(3))["busy"]
    assert state.previous is state.start
    engine.begin(2)
    assert engine.stage(make_offer(3)) == {}
    assert state.previous is None
    assert state.find(1) is None


@pytest.mark.parametrize(("seen", "oldest"), [(1, 1), (2, 1)])
def test_a_third_generation_waits_for_every_api_server(
    seen: int, oldest: int, engine: Engine, make_offer: Callable[..., Offer]
) -> None:
    for rank in (0, 1):
        engine.follow(rank, 1, 1)
    assert engine.stage(make_offer(2)) == {}
    engine.commit()
    engine.follow(0, 2, 2)
    assert engine.follow(1, seen, oldest)["slowest"] == seen
    assert "still in flight" in engine.stage(make_offer(3))["busy"]
    assert engine.follow(1, 2, 2)["slowest"] == 2
    assert engine.stage(make_offer(3)) == {}


def test_an_api_server_learns_of_a_generation_whatever_became_of_its_files(
    engine: Engine, drilled: context.Context, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(
        "drills: [{name: late, sae: s, delta: last_prompt.safetensors}]"
    )
    printed = file_fingerprint(load_policy(path))
    offer = Offer("me", 2, str(path), path.read_bytes(), printed)
    assert engine.stage(offer) == {}
    staged = drilled.staged
    assert staged is not None
    notice = reload.write_notice(staged, offer)
    reload._commit(engine, offer.owner, notice)
    current = drilled.current
    assert current is staged
    found = rollout._load_adopted(notice)
    assert found.calibrations.keys() == current.calibrations.keys() != set()
    path.unlink()
    path.with_name("c.safetensors").unlink()
    assert rollout._load_adopted(notice).calibrations == {}
    assert engine.follow(0, 2, 2)["notice"] == ""
    told = reload.adopt(engine.follow(0, 1, 1)["notice"], drilled.start)
    for name in ("number", "policy_file", "fingerprint", "fingerprints", "numbers"):
        assert getattr(told, name) == getattr(current, name)
    assert told.edits["late"].prompt == current.edits["late"].prompt
    assert [told.slot(name) for name in ("default", "open")] == [17, 19]
