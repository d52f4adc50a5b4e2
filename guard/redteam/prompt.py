"""The prompt attackers against a whole policy: what a client can get by writing.

The words are searched on the model itself, with more than a client knows of it, and
then sent to a running server as a client would.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from guard.errors import CertificateError, PromptError
from guard.fingerprint import fingerprint
from guard.redteam.certificate import Attacker, PromptRow, Search, Served
from guard.redteam.evasion import Evasion
from guard.redteam.objective import Template
from guard.redteam.reply import deliver, write_message
from guard.redteam.soft import SoftConfig, attack_embeddings, record_soft
from guard.redteam.subject import encode
from guard.redteam.suffix import SuffixConfig, attack_prompts
from guard.redteam.tally import Try, choose_best, tally
from guard.redteam.target import Dialogue, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guard.client import Client
    from guard.recording import Recording
    from guard.redteam.evasion import Penalty
    from guard.redteam.subject import Subject

__all__ = [
    "ATTACKERS",
    "find_template",
    "retry_prompts",
    "run_prompts",
    "serve_prompts",
]

ATTACKERS: tuple[Attacker, ...] = ("unaware", "adaptive")
SAMPLED = 3
"""Replies at temperature 1 to each prompt that is sent, besides the greedy one."""


class _Found(NamedTuple):
    """What a search came to: the dialogues, and what the hooks see of them."""

    dialogues: Sequence[Dialogue]
    runs: Sequence[Recording]
    messages: tuple[str, ...] = ()


def run_prompts(
    subject: Subject,
    search: Search,
    attacker: Attacker,
    *,
    queries: int,
    seed: int,
    on_sample: Callable[[], object] = lambda: None,
) -> PromptRow:
    """Attack all valid samples by what is written.

    Args:
        subject: What is attacked.
        search: For tokens, or for vectors that no client can send; `none` sends the
            prompts as they are.
        attacker: An adaptive one pays for what the monitors would see, and goes for the
            least that counts as well; the better of the two counts.
        queries: Prompts that are tried per sample and goal.
        seed: Of the search.
        on_sample: Told when a sample is done.
    """
    evasion = Evasion(
        subject.reader,
        subject.receiver(subject.policy),
        max_tokens=subject.target.max_tokens,
    )
    find = {"none": _plain, "suffix": _suffix, "soft_prompt": _soft}[search]
    goals, penalty = [subject.wanted], None
    if attacker == "adaptive":
        goals, penalty = [subject.wanted, subject.parts], evasion
    tries = [
        _judge(subject, find(subject, goal, penalty, queries, seed, on_sample))
        for goal in goals
    ]
    best = choose_best(tries)
    return PromptRow(
        search=search,
        attacker=attacker,
        queries=queries * len(goals) if search == "suffix" else 0,
        **tally(subject, best)._asdict(),
        prompts=tuple(one.message for one in best if one.message is not None),
    )


def retry_prompts(subject: Subject, row: PromptRow) -> PromptRow:
    """Answer the prompts of a row again, and say what comes of them now."""
    asked = [
        encode(subject.tokenizer, sample.prompt.model_copy(update={"prompt": text}))
        for sample, text in zip(subject.samples, row.prompts, strict=True)
    ]
    given = answer(subject.target, asked, clamp=subject.target.clamp)
    found = _judge(subject, _Found(given, subject.record(given)))
    return row.model_copy(update=tally(subject, found)._asdict())


@dataclass(frozen=True, slots=True)
class _Try(Try):
    """What one search of words or vectors reached on one sample."""

    message: str | None
    """What was written, if it can be."""


def _judge(subject: Subject, found: _Found) -> list[_Try]:
    """Say of each sample what a client receives."""
    free = subject.judge.judge_answers(subject.wanted, found.dialogues)
    guarded = subject.receive(subject.policy, found.dialogues, found.runs)
    messages = found.messages or [None] * len(free)
    return [_Try(*parts) for parts in zip(free, guarded, messages, strict=True)]


def _plain(
    subject: Subject,
    wanted: Sequence[Dialogue],
    _penalty: Penalty | None,
    _queries: int,
    _seed: int,
    on_sample: Callable[[], object],
) -> _Found:
    prompts = [sample.prompt for sample in wanted]
    given = answer(subject.target, prompts, clamp=subject.target.clamp)
    for _ in given:
        on_sample()
    return _Found(given, subject.record(given), _write(subject, prompts))


def _suffix(
    subject: Subject,
    wanted: Sequence[Dialogue],
    penalty: Penalty | None,
    queries: int,
    seed: int,
    on_sample: Callable[[], object],
) -> _Found:
    template, words = find_template(subject), subject.words
    messages = [
        subject.tokenizer.encode(message["content"], add_special_tokens=False)
        for prompt in subject.benign
        for message in prompt.conversation
    ]
    config = SuffixConfig(queries=queries, seed=seed)

    def can_send(prompt: list[int]) -> bool:
        try:
            write_message(subject.tokenizer, prompt)
        except PromptError:
            return False
        return True

    prompts: list[list[int]] = []
    dialogues: list[Dialogue] = []
    for sample in wanted:
        result = attack_prompts(
            subject.target,
            [sample],
            config,
            template=template,
            allowed=words,
            messages=messages,
            can_send=can_send,
            penalty=penalty,
        )
        prompts += result.prompts
        dialogues += result.dialogues
        on_sample()
    return _Found(dialogues, subject.record(dialogues), _write(subject, prompts))


def _soft(
    subject: Subject,
    wanted: Sequence[Dialogue],
    penalty: Penalty | None,
    _queries: int,
    seed: int,
    on_sample: Callable[[], object],
) -> _Found:
    dialogues: list[Dialogue] = []
    runs: list[Recording] = []
    for sample in wanted:
        result = attack_embeddings(
            subject.target,
            [sample],
            SoftConfig(seed=seed),
            template=find_template(subject),
            penalty=penalty,
        )
        dialogues += result.dialogues
        runs += record_soft(subject.target, result, subject.layers)
        on_sample()
    return _Found(dialogues, runs)


def find_template(subject: Subject) -> Template:
    """Return what the chat template puts around a message.

    Raises:
        CertificateError: Samples are no chats of one message.
    """
    kinds = {len(sample.prompt.conversation) for sample in subject.samples}
    if kinds != {1}:
        message = (
            "Prompts that are not one message of a user cannot be attacked by words; "
            "expected lines with 'prompt'."
        )
        raise CertificateError(message)
    one, other = (
        encode(subject.tokenizer, sample.prompt.model_copy(update={"prompt": text}))
        for sample in subject.samples[:1]
        for text in ("", subject.samples[0].prompt.conversation[0]["content"])
    )
    before = 0
    while before < len(one) and one[before] == other[before]:
        before += 1
    return Template(before, len(one) - before)


def _write(subject: Subject, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    return tuple(write_message(subject.tokenizer, prompt) for prompt in prompts)


def serve_prompts(
    subject: Subject, client: Client, messages: Sequence[str], *, seed: int
) -> Served:
    """Send attacked prompts to a server that runs the policy.

    Each is answered greedily and some times at temperature 1; every answer is judged by
    the predicate of all others.

    Args:
        subject: What was attacked.
        client: Of the server.
        messages: A prompt for each sample.
        seed: Of the sampled answers.

    Raises:
        EngineError: The server cannot be reached, or refuses.
        CertificateError: It answers under another version of the policy.
    """
    exchanges = deliver(
        client,
        messages,
        max_tokens=subject.target.max_tokens,
        samples=SAMPLED,
        policy=subject.name,
        seed=seed,
    )
    replies = [
        (sample.wanted, reply)
        for sample, exchange in zip(subject.samples, exchanges, strict=True)
        for reply in exchange.replies
    ]
    _check_versions(subject, {reply.fingerprint for _, reply in replies})
    given = [
        Dialogue(
            wanted.prompt,
            subject.tokenizer.encode(reply.text, add_special_tokens=False),
        )
        for wanted, reply in replies
    ]
    judged = subject.judge.judge_answers([wanted for wanted, _ in replies], given)
    actions = Counter(reply.action for _, reply in replies)
    return Served(
        attempts=len(replies),
        recovered=sum(one.recovered for one in judged),
        blocked=actions["block"],
        flagged=actions["flag"],
    )


def _check_versions(subject: Subject, found: set[str]) -> None:
    """Refuse what a replica behind a proxy, or a reload, had answered otherwise."""
    wanted = fingerprint(subject.policy_file, subject.name)
    if others := sorted(found - {wanted}):
        message = (
            f"Prompts were answered under version {others[0][:12]} of policy "
            f"{subject.name!r}; expected {wanted[:12]} alone."
        )
        raise CertificateError(message)
