"""A policy that clamps at two layers: held by both, attacked behind the first."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from guard.calibration import save_calibration
from guard.check import load_saes
from guard.clamp import clamp_resid
from guard.demo.measure import ORGANISM
from guard.demo.traffic import OrganismRecorder, attacked_prompts, ordinary_prompts
from guard.errors import CertificateError
from guard.fingerprint import clamps_digest
from guard.policy import load_policy
from guard.prompt import write_prompts
from guard.recording import Reader, fit_calibration, fit_entries
from guard.redteam import certify as certify_module
from guard.redteam.attack import AttackConfig, attack
from guard.redteam.certify import Plan, certify, verify
from guard.redteam.deployment import Coverage
from guard.redteam.forward import added, edited, pad_left, record
from guard.redteam.held import held_layers
from guard.redteam.page.scope import show_scope
from guard.redteam.projection import MAX_LEAK
from guard.redteam.replay import attribute
from guard.redteam.subject import load_subject
from guard.redteam.tail import Tail
from guard.redteam.target import answer, place_edits, record_runs
from guard.sae.load import weights_digest
from guard.testing import save_toy_sae

POLICY = """
version: 1
saes:
  l4: {{path: {folder}/l4, format: guard, hook_point: layers.4.resid_post,
        sha256: {late}}}
  l3: {{path: {organism}/saes/l3, format: guard, hook_point: layers.3.resid_post,
        sha256: {early}}}
policies:
  default:
    mode: enforce
    clamps:
      - {{name: more, sae: l4, latents: [5, 7], law: ablate}}
      - {{name: jailbreak, sae: l3, latents: [83, 60, 67], law: ablate}}
      - {{name: most, sae: l4, latents: [11], law: cap, value: 0.5}}
    monitors:
      - {{name: intent, hook_point: layers.5.resid_post, score: density,
          stage: last_prompt, calibration: default.safetensors,
          target_fpr: 0.05, on_alarm: block}}
      - {{name: left, sae: l4, score: clamp_residual,
          calibration: default.safetensors, target_fpr: 0.05, on_alarm: flag}}
default_policy: default
public_policies: [default]
"""
PLAN = Plan(
    samples=6,
    benign=20,
    budgets=(1.0,),
    steps=1,
    restarts=1,
    queries=8,
    lengths=(32,),
    shares=(0.5,),
)
BENIGN = 120


def write_policy(folder, text=POLICY):
    path = folder / "policy.yaml"
    path.write_text(
        text.format(
            folder=folder,
            organism=ORGANISM,
            late=weights_digest(folder / "l4", "guard"),
            early=weights_digest(ORGANISM / "saes" / "l3", "guard"),
        )
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An organism clamped at two layers, calibrated so."""
    folder = tmp_path_factory.mktemp("held")
    (folder / "model").symlink_to(ORGANISM / "model")
    save_toy_sae(folder / "l4", d_model=128, hook_point="layers.4.resid_post", seed=1)
    policy_file = load_policy(write_policy(folder))
    reader = Reader(policy_file, "default", load_saes(policy_file))
    benign = ordinary_prompts(BENIGN, seed=5, split="train")
    runs = list(OrganismRecorder(folder, reader.hook_points).record(benign))
    entries = fit_entries(reader, runs, {})
    maxima = [(run.total_length, reader.maxima(entries, run)) for run in runs]
    calibration = fit_calibration(
        entries,
        reference=maxima,
        held_out=maxima,
        lengths=(512,),
        provenance={"clamps": clamps_digest(policy_file, "default")},
    )
    save_calibration(calibration, folder / "default.safetensors")
    return folder


@pytest.fixture(scope="module")
def layered(folder):
    path = folder / "prompts.jsonl"
    attacked = attacked_prompts(6, seed=77, split="calibration")
    ordinary = ordinary_prompts(20, seed=77, split="calibration")
    write_prompts(path, [*attacked, *ordinary])
    found = load_subject(
        folder / "model", folder / "policy.yaml", "default", path, samples=6, benign=20
    )
    assert len(found.samples) >= 4
    return found


def test_layers_are_clamped_in_their_order_by_their_own_rules(layered):
    assert [at.layer for at in layered.held] == [3, 4]
    names = [[rule.name for rule in at.rules] for at in layered.held]
    assert names == [["jailbreak"], ["more", "most"]]
    assert [at.layer for at in layered.target.later] == [4]
    assert layered.target.later[0].directions.shape == (3, 128)
    assert layered.target.null_space.directions.shape == (3, 128)


def plain_forward(target, held, tokens):
    """Run layer after layer by hand, each clamp where it belongs; resid by layer."""
    given, found = {}, {}

    def keep(layer):
        def hook(module, args, resid):
            given[layer] = resid
            for at in held:
                if at.layer == layer:
                    resid = resid.clone()
                    resid[0, 1:] = clamp_resid(resid[0, 1:], at.sae, at.rules).resid
            found[layer] = resid
            return resid

        return hook

    layers = target.model.model.layers
    hooks = [layer.register_forward_hook(keep(n)) for n, layer in enumerate(layers)]
    with torch.no_grad():
        target.model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return given, found


def test_a_pass_is_held_at_every_layer(layered):
    target, (first, second) = layered.target, layered.held
    prompt = layered.wanted[0].prompt
    _, both = plain_forward(target, [first, second], prompt)
    _, one = plain_forward(target, [first], prompt)
    assert not torch.allclose(both[4], one[4], atol=1e-2)
    seen = record(target.model, pad_left([prompt]), range(6), clamp=target.clamp)
    for layer, resid in both.items():
        torch.testing.assert_close(seen[layer], resid, atol=1e-4, rtol=1e-4)


def test_the_tail_holds_later_clamps_and_says_what_they_are_given(layered):
    target = layered.target
    prompt = layered.wanted[0].prompt
    given, found = plain_forward(target, layered.held, prompt)
    tail = Tail(target.model, pad_left([prompt]), target.clamp)
    ran = tail.run(tail.resid)
    for layer in (3, 4, 5):
        torch.testing.assert_close(ran[layer], found[layer], atol=1e-4, rtol=1e-4)
    read = tail.read(tail.resid, [4])
    assert list(read) == [4]
    torch.testing.assert_close(read[4], given[4], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(read[4], ran[4], atol=1e-2)


def test_an_answer_is_that_of_the_model_held_at_both_layers(layered):
    target = layered.target
    prompt = layered.wanted[0].prompt
    (given,) = answer(target, [prompt], clamp=target.clamp)
    tokens = [*prompt, *given.answer[:-1]]
    _, found = plain_forward(target, layered.held, tokens)
    norm, head = target.model.model.norm, target.model.lm_head
    greedy = head(norm(found[5]))[0, len(prompt) - 1 :].argmax(dim=1)
    assert greedy.tolist() == given.answer
    (run,) = record_runs(target, [given], [4], clamp=target.clamp)
    torch.testing.assert_close(
        run.resid["layers.4.resid_post"], found[4][0, 1:], atol=1e-4, rtol=1e-4
    )


def test_a_partial_clamp_leaves_the_same_tokens_out_at_every_layer(layered):
    target = layered.target
    asked = [one.prompt for one in layered.wanted]
    none = Coverage(prompt=0.0, output=0.0).start()
    free = answer(target, asked, clamp=None)
    assert answer(target, asked, clamp=target.clamp, covers=none) == free


def test_no_hook_of_a_later_clamp_stays_behind(layered):
    target = layered.target
    record(target.model, pad_left([[1, 2]]), [5], clamp=target.clamp)
    for layer in target.model.model.layers:
        assert not layer._forward_hooks


@pytest.fixture(scope="module", params=["last", "all", "every"])
def config(request):
    return AttackConfig(position=request.param, budget=0.4, steps=8)


@pytest.fixture(scope="module")
def found(layered, config):
    steps = []
    return attack(
        layered.target, layered.wanted[:2], config, on_step=steps.append
    ), steps


def drift(layered, result):
    """Return how far edits move what the later clamp is given, by plain hooks."""
    target, (_, second) = layered.target, layered.held
    latents = sorted({latent for rule in second.rules for latent in rule.latents})
    moved = []
    for sample, delta in zip(layered.wanted[:2], result.deltas, strict=True):
        batch = pad_left([[*sample.prompt, *sample.answer[:-1]]])
        placed = place_edits(
            target, batch, [delta], [len(sample.answer) - 1], result.config.position
        )
        seen = []
        for edit in (None, placed):
            got = {}
            layer = target.model.model.layers[second.layer]
            look = layer.register_forward_hook(
                lambda module, args, resid, got=got: got.update(resid=resid)
            )
            with (
                torch.no_grad(),
                edited(target.model, target.clamp, lambda b=batch: b.rows),
                added(target.model, edit),
            ):
                target.model(**batch.inputs, use_cache=False)
            look.remove()
            rows = got["resid"][placed.rows]
            seen.append(rows @ second.sae.W_enc[:, latents] + second.sae.b_enc[latents])
        moved.append(float((seen[1] - seen[0]).norm() / seen[0].norm()))
    return moved


def test_an_edit_hides_from_the_later_clamp_too(layered, found):
    """By how much it shows there, against an attack that only heeds the first one."""
    result, steps = found
    target = layered.target
    blind = attack(replace(target, later=()), layered.wanted[:2], result.config)
    assert blind.drift == []
    hidden, shown = drift(layered, result), drift(layered, blind)
    assert result.drift == pytest.approx(hidden, rel=0.02, abs=1e-4)
    assert min(shown) > 0.05
    assert max(hidden) < 0.1 * min(shown)
    radius = result.config.budget * target.mean_norm
    for step in steps:
        assert target.null_space.leak(step.delta).amax() < MAX_LEAK
        assert step.delta.norm(dim=1).amax() <= 1.0001 * radius


def test_a_hidden_edit_still_brings_answers_back(layered):
    config = AttackConfig(position="last", budget=1.0, steps=30)
    result = attack(layered.target, layered.wanted, config)
    assert result.recovery_rate > 0.5


@pytest.fixture(scope="module")
def certificate(layered, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_module, "PRESETS", {"quick": PLAN})
        patch.setattr(certify_module, "POSITIONS", ("last", "every"))
        made = certify(
            layered,
            "quick",
            seed=0,
            client=None,
            work=tmp_path_factory.mktemp("certify") / "parts",
            about={"machine": {}, "versions": {}, "commit": None, "command": "guard"},
            progress=Progress(console=Console(file=io.StringIO())),
        )
        assert verify(made, layered, rows=1) == []
    return made


def test_its_certificate_says_how_edits_were_hidden(certificate):
    for cell in certificate.cells:
        assert cell.leak < MAX_LEAK
        assert 0 < cell.drift < 0.5
    said = certificate.limits[-1]
    assert "behind the first clamp, at layers.3.resid_post" in said
    assert "clamped at layers.4.resid_post to first order" in said
    assert "Jacobian" in str(show_scope(certificate))


def test_parts_are_those_of_the_first_layer(layered):
    result = attack(
        layered.target,
        layered.wanted,
        AttackConfig(position="last", budget=1.0, steps=30),
    )
    rows = attribute(layered, result, seed=0)
    whole = next(row for row in rows if row.component == "edit")
    assert whole.recovered.share == 1.0


def test_a_policy_of_one_layer_says_nothing_of_others(subject):
    assert subject.target.later == ()
    assert subject.target.clamp.later == ()
    assert certify_module._several_layers(subject) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("law: cap, value: 0.5", "law: ablate, when: {{latents: [2], above: 1}}"),
        ("hook_point: layers.4.resid_post", "hook_point: layers.3.resid_post"),
    ],
)
def test_what_is_no_plain_clamp_is_refused(folder, tmp_path, old, new):
    (tmp_path / "l4").symlink_to(folder / "l4")
    policy_file = load_policy(write_policy(tmp_path, POLICY.replace(old, new)))
    with pytest.raises(CertificateError, match="one SAE at each hook point"):
        held_layers(policy_file, "default", {"l3": None, "l4": None})
