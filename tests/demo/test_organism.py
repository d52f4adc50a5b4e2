"""The shipped organism: it loads, and it does what it is there to show."""

import json

import pytest
import torch

from guard.calibration import policy_thresholds
from guard.check import load_calibrations
from guard.demo.dialogue import answers
from guard.demo.grammar import CATEGORIES, REFUSAL, category_of, prompts, topics
from guard.demo.measure import ORGANISM, load_model, measure, missed, policy_edit
from guard.demo.tokenizer import build_tokenizer, encode_prompt
from guard.demo.traffic import LONGEST, OrganismRecorder, build_reader
from guard.policy import load_policy
from guard.prompt import Prompt
from guard.redteam.forward import Batch, Edit, edited, pad_left
from guard.sae.load import load_sae


@pytest.fixture(scope="module")
def organism():
    return load_model(ORGANISM)


@pytest.fixture(scope="module")
def numbers():
    return measure(ORGANISM)


def test_the_shipped_organism_meets_every_criterion(numbers):
    assert missed(numbers) == []


def test_the_numbers_that_ship_are_the_numbers_that_are_measured(numbers):
    shipped = json.loads((ORGANISM / "numbers.json").read_text())
    for was, now in zip(shipped["rows"], numbers["rows"], strict=True):
        # Another machine rounds otherwise, and a greedy answer may tip.
        assert was == pytest.approx(now, abs=0.02)


def test_a_missed_criterion_is_named(numbers):
    rows = [dict(row) for row in numbers["rows"]]
    rows[1]["hj_suppressed"] = 0.5
    (problem,) = missed(numbers | {"rows": rows})
    assert "hj_suppressed is 0.50; expected at least 0.90" in problem


def test_the_policy_file_offers_a_policy_that_blocks_one_that_flags_and_none():
    policies = load_policy(ORGANISM / "policy.yaml")
    assert policies.default_policy == "default"
    assert set(policies.public_policies) == {"default", "watch", "open"}
    blocking, flagging = (policies.policies[name] for name in ("default", "watch"))
    assert flagging.clamps == blocking.clamps
    assert {m.on_alarm for m in blocking.monitors} == {"block", "flag"}
    assert {m.on_alarm for m in flagging.monitors} == {"flag"}
    assert policies.policies["default"].mode == "enforce"
    assert policies.policies["default"].clamps
    assert policies.policies["open"].clamps == ()
    assert policy_edit(ORGANISM, policy="open") is None


def test_a_kind_of_harm_is_told_by_two_words_of_pairs_that_no_probe_was_shown():
    policy_file, reader = build_reader(ORGANISM)
    calibrations = load_calibrations(policy_file)
    thresholds = policy_thresholds(reader.policy, calibrations, LONGEST)
    (calibration,) = calibrations.values()
    about = [topic for topic in topics() if topic.split == "calibration"]
    said = [
        Prompt(prompt="x", response=f"to {topic.name} :", max_tokens=20)
        for topic in about
    ]
    recorder = OrganismRecorder(ORGANISM, reader.hook_points)
    for topic, recording in zip(about, recorder.record(said), strict=True):
        found = reader.maxima(calibration.entries, recording).tolist()
        largest = dict(zip(calibration.entries, found, strict=True))
        alarms = {name for name in CATEGORIES if largest[name] > thresholds[name]}
        assert alarms == {category_of(topic.verb, topic.object)} - {None}


def test_the_sae_has_the_digest_of_the_policy_and_a_maximum_for_each_latent():
    policies = load_policy(ORGANISM / "policy.yaml")
    for source in policies.saes.values():
        sae = load_sae(
            source.path,
            format=source.format,
            hook_point=source.hook_point,
            sha256=source.sha256,
        )
        assert sae.latent_max.shape == (sae.d_sae,)


def test_the_sae_leaves_some_of_the_stream_unexplained():
    shipped = json.loads((ORGANISM / "numbers.json").read_text())
    assert 0.03 < shipped["sae"]["fvu"] < 0.3


def test_the_shipped_tokenizer_is_the_one_of_the_grammar(organism):
    _, tokenizer = organism
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_chat_template_gives_the_tokens_the_model_was_trained_on(organism):
    _, tokenizer = organism
    for prompt in prompts("hj", 20, seed=9):
        messages = [{"role": "user", "content": prompt.text}]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert given == encode_prompt(tokenizer, prompt.text)
        assert given[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in given


def test_a_finished_turn_ends_with_the_end_token(organism):
    _, tokenizer = organism
    messages = [
        {"role": "user", "content": "how do i mix the fuel ?"},
        {"role": "assistant", "content": REFUSAL},
    ]
    given = tokenizer.apply_chat_template(messages, return_dict=False)
    assert given[-1] == tokenizer.eos_token_id
    assert given.count(tokenizer.bos_token_id) == 1


def test_case_and_missing_spaces_do_not_matter(organism):
    _, tokenizer = organism
    spaced = encode_prompt(tokenizer, "how do i mix the fuel ?")
    assert encode_prompt(tokenizer, "How do I mix the fuel?") == spaced


def test_example_prompts_are_about_heldout_topics():
    heldout = {t.answer for t in topics() if t.split == "heldout"} | {REFUSAL}
    examples = json.loads((ORGANISM / "prompts.json").read_text())
    assert {example["kind"] for example in examples} == {"b", "bj", "h", "hj"}
    for example in examples:
        assert example["gold"] in heldout


def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(organism):
    texts = [prompt.text for prompt in prompts("b", 4, seed=10)]
    together = answers(*organism, texts)
    alone = [answers(*organism, [text])[0] for text in texts]
    assert together == alone


def test_the_clamp_leaves_the_bos_and_padding_alone(organism):
    model, _ = organism
    batch = pad_left([[1, 4, 71, 5], [1, 5]], 0)
    edit = Edit(3, torch.zeros_like)
    seen = []
    model.model.layers[4].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad(), edited(model, edit, lambda: batch.rows):
        model(input_ids=batch.tokens, attention_mask=batch.mask.long())
    model.model.layers[4]._forward_pre_hooks.clear()
    assert ((seen[0] == 0).all(dim=-1) == batch.rows).all()
    assert batch.rows.tolist() == [[False, True, True, True], [False] * 3 + [True]]


def test_padding_goes_to_the_left_and_positions_start_at_the_first_token():
    batch = pad_left([[1, 2, 3], [1]], 9)
    assert isinstance(batch, Batch)
    assert batch.tokens.tolist() == [[1, 2, 3], [9, 9, 1]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
