"""The shipped organism as a target, and a few samples that its clamp suppresses."""

import pytest

from guard.demo.grammar import prompts
from guard.demo.measure import ORGANISM
from guard.demo.target import load_target, to_dialogue
from guard.redteam.target import find_valid


@pytest.fixture(scope="session")
def target():
    return load_target(ORGANISM)[0]


@pytest.fixture(scope="session")
def wanted():
    """Six jailbroken prompts of held-out topics with their gold answers."""
    _, tokenizer = load_target(ORGANISM)
    drawn = prompts("hj", 6, seed=11, splits=("heldout",))
    return [to_dialogue(tokenizer, prompt.text, prompt.gold) for prompt in drawn]


@pytest.fixture(scope="session")
def valid(target, wanted):
    found = find_valid(target, wanted)
    assert len(found) >= 4
    return found
