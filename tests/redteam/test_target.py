"""Valid samples, and what an engine would see of a run."""

import torch

from guard.hook import HookPoint
from guard.redteam.forward import pad_left, record
from guard.redteam.target import Dialogue, answer, find_valid, record_runs


def draw(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3.0 * torch.randn(num_rows, 128, generator=generator)


def test_a_valid_sample_is_answered_without_the_clamp_only(target, samples, valid):
    prompts = [sample.prompt for sample in valid]
    assert answer(target, prompts, clamp=None) == valid
    held = answer(target, prompts, clamp=target.clamp)
    assert not any(one == want for one, want in zip(held, valid, strict=True))
    # Twins: what both models say, only the clamped one, or neither.
    benign = [sample.prompt for sample in samples["b"]]
    assert find_valid(target, answer(target, benign, clamp=None)[:3]) == []
    assert find_valid(target, held) == []
    assert find_valid(target, [Dialogue(prompt, [2]) for prompt in prompts]) == []


def test_no_delta_is_the_clamped_model(target, valid):
    prompts = [sample.prompt for sample in valid]
    zeros = [torch.zeros(1, 128) for _ in valid]
    held = answer(target, prompts, clamp=target.clamp)
    assert answer(target, prompts, clamp=target.clamp, deltas=zeros) == held


def test_a_run_is_recorded_as_an_engine_computes_it(target, valid):
    """Prompt at once, then token by token, no padding, no neighbours."""
    clamp = target.clamp
    layers = [clamp.layer - 1, clamp.layer, clamp.layer + 1]
    deltas = [draw(2) for _ in valid]
    prompts = [sample.prompt for sample in valid]
    runs = answer(target, prompts, clamp=clamp, deltas=deltas)
    recorded = record_runs(target, runs, layers, clamp=clamp, deltas=deltas)
    for (prompt, given), delta, run in zip(runs, deltas, recorded, strict=True):
        assert run.prompt_length == len(prompt) - 1
        for layer in layers:
            seen = engine_resid(target, prompt, given, delta, layer)
            assert len(seen) == len(prompt) - 1 + len(given) - 1
            torch.testing.assert_close(run.resid[at(layer)], seen, atol=1e-3, rtol=1e-4)


def at(layer):
    return str(HookPoint(layer))


def engine_resid(target, prompt, given, delta, layer):
    rows, cache = [], None

    def clamp(module, args, resid):
        resid = resid.clone()
        bos = int(cache is None)
        resid[0, bos:] = target.clamp.apply(resid[0, bos:])
        if cache is None:
            resid[0, -len(delta) :] += delta
        return resid

    def keep(module, args, resid):
        rows.append(resid[0, int(cache is None) :])

    model = target.model
    hooks = [model.model.layers[target.clamp.layer].register_forward_hook(clamp)]
    hooks.append(model.model.layers[layer].register_forward_hook(keep))
    with torch.no_grad():
        for tokens in [prompt, *([token] for token in given[:-1])]:
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    for hook in hooks:
        hook.remove()
    return torch.cat(rows)


def test_a_delta_shows_on_its_rows_and_on_later_rows_of_later_layers(target, valid):
    hooked, delta = target.clamp.layer, draw(1)
    layers = [hooked - 1, hooked, hooked + 1]
    runs = [
        record_runs(target, valid[:1], layers, clamp=target.clamp, deltas=deltas)[0]
        for deltas in (None, [delta])
    ]
    still, moved = ({n: run.resid[at(n)] for n in layers} for run in runs)
    last = runs[0].prompt_length - 1
    changed = {
        layer: (moved[layer] - still[layer]).abs().amax(dim=1) > 1e-4
        for layer in layers
    }
    assert not changed[hooked - 1].any()
    assert changed[hooked].nonzero().flatten().tolist() == [last]
    torch.testing.assert_close(
        (moved[hooked] - still[hooked])[last], delta[0], atol=1e-4, rtol=0
    )
    assert not changed[hooked + 1][:last].any()
    assert changed[hooked + 1][last:].all()


def test_without_deltas_and_clamp_a_run_is_the_plain_model(target, valid):
    (run,) = record_runs(target, valid[:1], [5], clamp=None)
    prompt, given = valid[0]
    batch = pad_left([[*prompt, *given[:-1]]])
    plain = record(target.model, batch, [5], clamp=None)[5][0, 1:]
    torch.testing.assert_close(run.resid[at(5)], plain)
