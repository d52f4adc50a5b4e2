"""What is attacked: which prompts are samples, and which cannot be."""

from dataclasses import replace

import pytest

from guard.demo.measure import ORGANISM
from guard.errors import CertificateError
from guard.redteam import subject as subject_module
from guard.redteam.subject import load_subject, load_transformer
from guard.redteam.target import answer


def load(samples):
    return load_subject(
        ORGANISM / "model",
        ORGANISM / "policy.yaml",
        "default",
        ORGANISM / "certify.jsonl",
        samples=samples,
        benign=20,
    )


def test_what_the_clamp_does_not_hold_is_no_sample_and_is_counted():
    subject = load(16)
    assert subject.unheld
    assert len(subject.samples) + len(subject.unheld) == subject.drawn == 16
    for samples, holds in ((subject.samples, True), (subject.unheld, False)):
        wanted = [sample.wanted for sample in samples]
        asked = [one.prompt for one in wanted]
        given = answer(subject.target, asked, clamp=subject.target.clamp)
        outcomes = subject.judge.judge_answers(wanted, given)
        assert {not one.recovered for one in outcomes} == {holds}
    assert subject.count_unheld_received() == 0
    # Twin: where no monitor stops them a client has them.
    open_to_all = replace(subject, name="open")
    assert open_to_all.count_unheld_received() == len(subject.unheld)


def test_prompts_without_a_bos_are_refused(monkeypatch):
    model, tokenizer = load_transformer(ORGANISM / "model")
    model.config.bos_token_id = None
    monkeypatch.setattr(
        subject_module, "load_transformer", lambda folder: (model, tokenizer)
    )
    with pytest.raises(CertificateError, match=r"begin with tokens \[1\]; expected"):
        load(4)
