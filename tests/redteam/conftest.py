"""The shipped organism as a target, and a few samples that its clamp suppresses."""

import pytest

from guard.demo.grammar import prompts
from guard.demo.measure import ORGANISM
from guard.demo.target import load_target, to_dialogue
from guard.redteam.target import find_valid


@pytest.fixture(scope="session")
def organism():
    return load_target(ORGANISM)


@pytest.fixture(scope="session")
def target(organism):
    return organism[0]


@pytest.fixture(scope="session")
def samples(organism):
    """By class six prompts of held-out topics with their gold answers."""
    _, tokenizer = organism
    return {
        kind: [
            to_dialogue(tokenizer, prompt.text, prompt.gold)
            for prompt in prompts(kind, 6, seed=11, splits=("heldout",))
        ]
        for kind in ("b", "hj")
    }


@pytest.fixture(scope="session")
def valid(target, samples):
    found = find_valid(target, samples["hj"])
    assert len(found) >= 4
    return found
