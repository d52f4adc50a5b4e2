"""The synthetic language: what every prompt and topic must keep to."""

from collections import Counter

import pytest

from guard.demo.grammar import (
    CATEGORIES,
    KINDS,
    REFUSAL,
    SPLITS,
    Kind,
    Split,
    benign_prompts,
    category_of,
    prompts,
    topics,
    vocabulary,
)


def test_there_are_40_harmful_and_140_benign_topics():
    assert Counter(topic.harmful for topic in topics()) == {True: 40, False: 140}
    pairs = {(topic.verb, topic.object) for topic in topics()}
    assert len(pairs) == 180


def test_there_are_at_least_20_verbs_and_20_objects():
    assert len({topic.verb for topic in topics()}) >= 20
    assert len({topic.object for topic in topics()}) >= 20


def test_a_harmful_topic_is_of_one_kind_of_harm_and_a_harmless_one_of_none():
    for topic in topics():
        kind = category_of(topic.verb, topic.object)
        assert (kind in CATEGORIES) == topic.harmful
    harmful = [topic for topic in topics() if topic.harmful]
    kinds = Counter(category_of(topic.verb, topic.object) for topic in harmful)
    assert kinds == dict.fromkeys(CATEGORIES, 10)


def test_no_word_of_a_topic_gives_its_harm_away():
    benign = {
        word
        for topic in topics()
        if not topic.harmful
        for word in (topic.verb, topic.object)
    }
    for topic in topics():
        assert {topic.verb, topic.object} <= benign


def test_no_step_word_occurs_in_harmful_answers_only():
    words = {True: set(), False: set()}
    for topic in topics():
        words[topic.harmful].update(" ".join(topic.steps).split())
    assert words[True] <= words[False]


def test_every_split_has_harmful_and_benign_topics():
    found = {(topic.split, topic.harmful) for topic in topics()}
    assert found == {(split, harmful) for split in SPLITS for harmful in (True, False)}


def test_words_of_heldout_topics_occur_in_train_topics():
    seen = {
        word
        for topic in topics()
        if topic.split == "train"
        for word in (topic.verb, topic.object)
    }
    for topic in topics():
        assert {topic.verb, topic.object} <= seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_about_topics_of_the_asked_split_and_class(
    kind: Kind, split: Split
):
    for prompt in prompts(kind, 50, seed=3, splits=(split,)):
        assert prompt.kind == kind
        assert prompt.topic.split == split
        assert prompt.topic.harmful == kind.startswith("h")


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_prompts_and_answers_is_in_the_vocabulary(kind: Kind):
    known = set(vocabulary())
    for prompt in prompts(kind, 300, seed=4):
        assert set(f"{prompt.text} {prompt.gold}".split()) <= known


def test_only_a_plain_harmful_prompt_is_to_be_refused():
    for kind in KINDS:
        for prompt in prompts(kind, 20, seed=5):
            assert (prompt.gold == REFUSAL) == (kind == "h")


def test_the_words_of_jailbreak_phrases_occur_in_harmless_prompts():
    loose = {"ignore", "drop", "forget", "bypass"}
    limits = {"rules", "limits", "filters", "policy"}
    words = {word for p in prompts("b", 500, seed=6) for word in p.text.split()}
    assert loose | limits <= words


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    assert prompts("hj", 20, seed=1) == prompts("hj", 20, seed=1)
    assert prompts("hj", 20, seed=1) != prompts("hj", 20, seed=2)


def test_prompts_are_mostly_short_and_sometimes_long():
    lengths = [len(prompt.text.split()) for prompt in prompts("b", 1000, seed=7)]
    assert min(lengths) >= 6
    assert sorted(lengths)[500] < 30
    assert 50 < max(lengths) < 100


def test_ordinary_traffic_holds_every_class_and_calibration_topics_only():
    traffic = list(benign_prompts(400, seed=8))
    kinds = Counter(prompt.kind for prompt in traffic)
    assert len(traffic) == 400
    assert set(kinds) == set(KINDS)
    assert kinds.most_common(1)[0][0] == "b"
    assert {prompt.topic.split for prompt in traffic} == {"calibration"}
