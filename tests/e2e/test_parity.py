"""The guarded engine against transformers with a forward hook doing the plain clamp.

Both run the organism on the same 200 prompts: the engine compiled and batched, the
other one request at a time.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from e2e.offline import Generation, Job, run_offline

from guard.calibration import load_calibration, save_calibration
from guard.check import load_calibrations
from guard.clamp import clamp_resid
from guard.demo.grammar import KINDS, prompts
from guard.demo.measure import ORGANISM, load_model
from guard.demo.tokenizer import encode_prompt
from guard.demo.traffic import build_reader
from guard.hook import HookPoint
from guard.policy import load_policy
from guard.recording import Reader, Recording
from guard.sae.load import load_sae
from guard.score import SCORES
from guard.traffic import Told

PER_KIND = 50
MAX_TOKENS = 20
LOGPROB_TOLERANCE = 1e-3
READING_TOLERANCE = 0.01
"""Relative, and for what may be around 0 in the unit of the score."""


@dataclass(frozen=True)
class Reference:
    """The plain clamp on transformers."""

    tokens: list[int]
    logprobs: list[float]
    gaps: list[float]
    """Logit of the best token over the second best, where each token was chosen."""
    prompt_logprobs: list[float]
    scores: dict[str, float]
    """Largest score of the request, by monitor."""


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The organism's policies, whose alarms are only reported: every answer ends."""
    text = (ORGANISM / "policy.yaml").read_text()
    for folder in ("saes", "calib", "probes", "drills"):
        text = text.replace(f" {folder}/", f" {ORGANISM}/{folder}/")
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(text.replace("on_alarm: block", "on_alarm: flag"))
    return path


@pytest.fixture(scope="module")
def rough_policy_file(policy_file: Path) -> Path:
    """The same for a model in bf16, as far as the calibration says."""
    (source,) = load_calibrations(load_policy(policy_file))
    calibration = load_calibration(Path(source))
    copy = policy_file.with_name("rough.safetensors")
    provenance = {**calibration.provenance, "dtype": "bfloat16"}
    save_calibration(replace(calibration, provenance=provenance), copy)
    path = policy_file.with_name("rough.yaml")
    path.write_text(policy_file.read_text().replace(source, str(copy)))
    return path


@pytest.fixture(scope="module")
def prompt_ids() -> list[list[int]]:
    _, tokenizer = load_model(ORGANISM)
    return [
        encode_prompt(tokenizer, prompt.text)
        for kind in KINDS
        for prompt in prompts(kind, PER_KIND, seed=9_000_000)
    ]


def refer(
    served: Sequence[Generation],
    prompt_ids: list[list[int]],
    dtype: torch.dtype,
    name: str,
) -> list[Reference]:
    """Answer every prompt greedily under a policy, one at a time.

    In one pass over prompt and served answer, up to where the model itself would have
    gone on otherwise: no row of it depends on what follows.
    """
    model, tokenizer = load_model(ORGANISM)
    model = model.to(dtype)
    policy_file, reader = build_reader(ORGANISM, name)
    (source,) = policy_file.saes.values()
    sae = load_sae(source.path, format=source.format, sha256=source.sha256)
    layer = HookPoint.parse(source.hook_point).layer
    seen: dict[str, torch.Tensor] = {}

    def keep(at: str) -> Callable[[object, object, torch.Tensor], None]:
        return lambda _module, _args, output: seen.update({at: output[0, 1:].float()})

    def hook(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        rows = output[0, 1:]  # a true BOS at position 0 is neither edited nor scored
        clamped = clamp_resid(rows, sae, reader.policy.clamps)
        touched = clamped.clamped.any(1, keepdim=True)
        output[0, 1:] = torch.where(touched, clamped.resid.to(dtype), rows)
        return output

    layers = model.model.layers
    handles = [layers[layer].register_forward_hook(hook)]
    for at in reader.hook_points:  # behind the clamp's own hook
        place = HookPoint.parse(at).layer
        module = model.model.embed_tokens if place < 0 else layers[place]
        handles.append(module.register_forward_hook(keep(at)))
    found = [
        _refer_one(model, ids, ours.tokens, tokenizer.eos_token_id, reader, seen)
        for ids, ours in zip(prompt_ids, served, strict=True)
    ]
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def _refer_one(
    model: torch.nn.Module,
    prompt: list[int],
    answer: list[int],
    eos: int,
    reader: Reader,
    seen: dict[str, torch.Tensor],
) -> Reference:
    assert answer[-1] == eos or len(answer) == MAX_TOKENS
    whole = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(whole, use_cache=False).logits[0].float()
    answering = logits[len(prompt) - 1 :]
    chosen = answering.argmax(1).tolist()
    steps = zip(chosen, answer, strict=True)
    same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], steps)))
    tokens = chosen[: same + 1]
    rows = answering[: len(tokens)]
    best, second = rows.topk(2).values.unbind(1)
    logprobs = rows.log_softmax(1).amax(1)
    own = logits.log_softmax(1)[: len(prompt) - 1]
    following = torch.tensor(prompt[1:])[:, None]
    length = len(prompt) + len(tokens) - 2  # but the BOS and the last token
    recording = Recording(
        resid={at: resid[:length] for at, resid in seen.items()},
        prompt_length=len(prompt) - 1,
        total_length=len(prompt) + MAX_TOKENS,
    )
    monitors = reader.policy.monitors
    paths = {monitor.calibration for monitor in monitors if monitor.calibration}
    entries = {
        name: entry
        for path in paths
        for name, entry in load_calibration(path).entries.items()
    }
    maxima = reader.maxima(entries, recording).tolist()
    scores = {one.name: top for one, top in zip(monitors, maxima, strict=True)}
    return Reference(
        tokens=tokens,
        logprobs=logprobs.tolist(),
        gaps=(best - second).tolist(),
        prompt_logprobs=own.gather(1, following)[:, 0].tolist(),
        scores=scores,
    )


def serve(
    prompt_ids: list[list[int]], dtype: str, policy: str | None, policy_file: Path
) -> list[Generation]:
    job = Job(
        model=str(ORGANISM / "model"),
        prompts=prompt_ids,
        dtype=dtype,
        policy=policy,
        policy_file=str(policy_file),
        max_tokens=MAX_TOKENS,
        out=str(policy_file.with_name(f"{dtype}-{policy}.json")),
    )
    return run_offline(job, policy_file.parent)


Gaps = list[np.ndarray[tuple[int], np.dtype[np.float64]]]
"""|d logprob| of the tokens of each prompt."""


def differences(
    served: Sequence[Generation | Reference], referred: Sequence[Reference]
) -> Gaps:
    """Return |d logprob| of every token both chose, prompts included."""
    found = []
    for ours, theirs in zip(served, referred, strict=True):
        pairs = list(zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True))
        for step, token in enumerate(ours.tokens[: len(theirs.tokens)]):
            if token != theirs.tokens[step]:
                break
            pairs.append((ours.logprobs[step], theirs.logprobs[step]))
        found.append(np.array([abs(a - b) for a, b in pairs]))
    return found


def bootstrap_ratio(above: Gaps, below: Gaps, quantile: float) -> list[float]:
    """Return a 95 % interval of the ratio of two quantiles, over prompts."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        drawn = generator.integers(len(above), size=len(above))
        ratios.append(
            np.quantile(np.concatenate([above[i] for i in drawn]), quantile)
            / np.quantile(np.concatenate([below[i] for i in drawn]), quantile)
        )
    return [float(bound) for bound in np.quantile(ratios, (0.025, 0.975))]


@pytest.fixture(scope="module")
def exact(
    prompt_ids: list[list[int]], policy_file: Path
) -> tuple[list[Generation], list[Reference]]:
    served = serve(prompt_ids, "float32", "default", policy_file)
    return served, refer(served, prompt_ids, torch.float32, "default")


def test_fp32_chooses_the_same_greedy_tokens(
    exact: tuple[list[Generation], list[Reference]],
) -> None:
    served, referred = exact
    exceptions = [
        (index, step, theirs.gaps[step])
        for index, (ours, theirs) in enumerate(zip(served, referred, strict=True))
        for step, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=False))
        if a != b
    ]
    assert not exceptions, f"(prompt, step, logit gap): {exceptions}"
    assert [ours.tokens for ours in served] == [theirs.tokens for theirs in referred]


def test_fp32_logprobs_agree(exact: tuple[list[Generation], list[Reference]]) -> None:
    gaps = np.concatenate(differences(*exact))
    assert len(gaps) > 4000
    assert gaps.max() < LOGPROB_TOLERANCE


def test_fp32_readings_agree(exact: tuple[list[Generation], list[Reference]]) -> None:
    monitors = load_policy(ORGANISM / "policy.yaml").policies["default"].monitors
    assert {one.score for one in monitors} == SCORES.keys()
    assert any(one.stage == "output" and one.drift is not None for one in monitors)
    for ours, theirs in zip(*exact, strict=True):
        assert ours.guard is not None
        told = Told.of(ours.guard, 0).scores
        assert told.keys() == {monitor.name for monitor in monitors}
        assert told == pytest.approx(
            theirs.scores, rel=READING_TOLERANCE, abs=READING_TOLERANCE
        )


def test_fp32_clamps_where_the_reference_does(
    exact: tuple[list[Generation], list[Reference]],
) -> None:
    suppressed = [ours for ours in exact[0] if ours.guard]
    assert len(suppressed) == 4 * PER_KIND
    assert any(sum(ours.guard["clamped_tokens"].values()) for ours in suppressed)


def noise_gain() -> float:
    """Return by how much the clamp can magnify what rounding did before it.

    Ablating latents i where they are active maps a deviation e of the stream to
    `(I - W_enc[:, i] @ W_dec[i]).T @ e`: an oblique projection, whose norm is 1 only if
    encoder and decoder directions are the same.
    """
    policy_file = load_policy(ORGANISM / "policy.yaml")
    (source,) = policy_file.saes.values()
    sae = load_sae(source.path, format=source.format, sha256=source.sha256)
    (rule,) = policy_file.policies["default"].clamps
    assert rule.law == "ablate"
    written = sae.W_enc[:, list(rule.latents)] @ sae.W_dec[list(rule.latents)]
    return float(torch.linalg.matrix_norm(torch.eye(sae.d_model) - written, 2))


def test_the_clamp_magnifies_no_rounding() -> None:
    assert noise_gain() <= 1 + 1e-3


def test_the_bf16_gap_is_no_larger_than_the_unguarded_one(
    prompt_ids: list[list[int]],
    rough_policy_file: Path,
    exact: tuple[list[Generation], list[Reference]],
) -> None:
    """Hold the guarded gap against the unguarded one between the same two engines.

    Two engines round differently in bf16, guarded or not, and an exact clamp whose
    `noise_gain` is 1 adds nothing to that: in the 99 % quantile. A single gap can
    still be larger (.31 against .06): a rounding flips which latents a TopK keeps,
    whoever computes it, as transformers in bf16 against itself in fp32 shows without
    the guard (.21 against .05).
    """

    def follow(
        policy: str | None, name: str
    ) -> tuple[list[Generation], list[Reference]]:
        served = serve(prompt_ids, "bfloat16", policy, rough_policy_file)
        return served, refer(served, prompt_ids, torch.bfloat16, name)

    held, rough_held = follow("default", "default")
    let, rough_let = follow(None, "open")
    guarded, unguarded = differences(held, rough_held), differences(let, rough_let)
    clamped = differences(rough_held, exact[1])
    free = differences(rough_let, refer(let, prompt_ids, torch.float32, "open"))
    shown = {
        name: np.quantile(np.concatenate(gaps), (0.5, 0.99, 1.0)).tolist()
        for name, gaps in {
            "engines, guarded": guarded,
            "engines, unguarded": unguarded,
            "transformers, clamped": clamped,
            "transformers, free": free,
        }.items()
    }
    growth = bootstrap_ratio(guarded, unguarded, 0.99)
    own = bootstrap_ratio(clamped, free, 0.99)
    shown |= {"growth at .99": growth, "of the clamp alone": own}
    print(shown)  # noqa: T201 - the numbers behind the verdict
    assert growth[0] <= 1, shown
    assert shown["engines, guarded"][1] <= 1.1 * shown["engines, unguarded"][1], shown
