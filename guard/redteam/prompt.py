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
    from collections.abc import Callable, Iterator, Sequence

    from guard.client import Client
    from guard.recording import Recording
    from guard.redteam.evasion import Penalty
    from guard.redteam.subject import Sample, Subject

__all__ = [
    "ATTACKERS",
    "BEGUN",
    "encode_prompts",
    "find_template",
    "retry_prompts",
    "run_prompts",
    "serve_prompts",
]

ATTACKERS: tuple[Attacker, ...] = ("unaware", "adaptive")
BEGUN: tuple[Search, ...] = ("prefilled", "constrained")
"""Where the client begins the answer himself."""
BEGUN_TOKENS = 4
"""Of an answer, that he begins: with those of what he wants, where a search begins."""
_TRIES_PER_STEP = 10
"""Prompts that others try, for each step of a search for vectors."""
SAMPLED = 3
"""Replies at temperature 1 to each prompt that is sent, besides the greedy one."""


class _Found(NamedTuple):
    """What a search came to: the dialogues, and what the hooks see of them."""

    dialogues: Sequence[Dialogue]
    runs: Sequence[Recording]
    messages: Sequence[str] = ()
    beginnings: Sequence[str] = ()


class _Hunt(NamedTuple):
    """What the searches of one row have in common."""

    subject: Subject
    search: Search
    queries: int
    seed: int
    on_sample: Callable[[], object]


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
            prompts as they are. Who begins the answer knows how it begins: unless he
            adapts, he searches for nothing.
        attacker: An adaptive one pays for what the monitors would see, and goes for the
            least that counts as well; the best that either attacker found counts.
        queries: Prompts that are tried per sample and goal; where vectors are searched
            for, a tenth as many steps.
        seed: Of the search.
        on_sample: Told when a sample is done.
    """
    hunt = _Hunt(subject, search, queries, seed, on_sample)
    find = {"none": _plain, "soft_prompt": _soft}.get(search, _write_words)
    aims = _aims(subject, search)
    goals: list[tuple[Sequence[Dialogue], Penalty | None]] = []
    if attacker == "adaptive":
        evasion = Evasion(
            subject.reader,
            subject.receiver(subject.policy),
            max_tokens=subject.target.max_tokens,
        )
        goals += [(aims, evasion), (subject.shorten(aims), evasion)]
    goals.append((aims, None))  # last: of what does as well, the adapted prompt is kept
    best = choose_best(
        [
            _judge(subject, search, found)
            for wanted, penalty in goals
            for found in find(hunt, wanted, penalty)
        ]
    )
    searched = len(goals) - (search in BEGUN)
    return PromptRow(
        search=search,
        attacker=attacker,
        queries=queries * searched if search in ("suffix", *BEGUN) else 0,
        **tally(subject, best)._asdict(),
        prompts=tuple(one.message for one in best if one.message is not None),
        beginnings=tuple(one.beginning for one in best if one.beginning),
    )


def retry_prompts(subject: Subject, row: PromptRow) -> PromptRow:
    """Answer the prompts of a row again, and say what comes of them now."""
    found = _ask(subject, row.search, encode_prompts(subject, row))
    best = _judge(subject, row.search, found)
    return row.model_copy(update=tally(subject, best)._asdict())


def encode_prompts(subject: Subject, row: PromptRow) -> list[list[int]]:
    """Return the prompts of a row as token ids, with the words that begin answers."""
    beginnings = row.beginnings or [""] * len(row.prompts)
    return [
        encode(subject.tokenizer, sample.prompt.model_copy(update={"prompt": text}))
        + _tokenize(subject, beginning)
        for sample, text, beginning in zip(
            subject.samples, row.prompts, beginnings, strict=True
        )
    ]


def _tokenize(subject: Subject, text: str) -> list[int]:
    return list(subject.tokenizer.encode(text, add_special_tokens=False))


def _aims(subject: Subject, search: Search) -> list[Dialogue]:
    """Return what is wanted of each sample, behind what the client begins himself."""
    if search not in BEGUN:
        return subject.wanted
    return [
        Dialogue([*prompt, *given[:count]], given[count:])
        for prompt, given in subject.wanted
        for count in [min(BEGUN_TOKENS, len(given) // 2)]
    ]


def _count_begun(subject: Subject, search: Search) -> list[int]:
    """Return with how many tokens the client begins each answer."""
    pairs = zip(_aims(subject, search), subject.wanted, strict=True)
    return [len(aim.prompt) - len(want.prompt) for aim, want in pairs]


@dataclass(frozen=True, slots=True)
class _Try(Try):
    """What one search of words or vectors reached on one sample."""

    message: str | None
    """What was written, if it can be."""
    beginning: str | None
    """How the client began the answer, where he did."""


def _judge(subject: Subject, search: Search, found: _Found) -> list[_Try]:
    """Say of each sample what a client receives, besides what he said himself."""
    aims, given = _aims(subject, search), found.dialogues
    own = [0] * len(given)
    if search == "constrained":
        own = _count_begun(subject, search)
    behind = [Dialogue(p, said[n:]) for (p, said), n in zip(given, own, strict=True)]
    free = subject.judge.judge_answers(aims, behind)
    guarded = subject.receive(subject.policy, given, found.runs, wanted=aims, own=own)
    nothing = [None] * len(free)
    columns = (free, guarded, found.messages or nothing, found.beginnings or nothing)
    return [_Try(*column) for column in zip(*columns, strict=True)]


def _plain(
    hunt: _Hunt, wanted: Sequence[Dialogue], _penalty: Penalty | None
) -> Iterator[_Found]:
    for _ in wanted:
        hunt.on_sample()
    yield _ask(hunt.subject, hunt.search, [sample.prompt for sample in wanted])


def _write_words(
    hunt: _Hunt, wanted: Sequence[Dialogue], penalty: Penalty | None
) -> Iterator[_Found]:
    """Search for words, and yield the best for each sample, then the next best."""
    subject = hunt.subject
    messages = [
        _tokenize(subject, message["content"])
        for prompt in subject.benign
        for message in prompt.conversation
    ]
    found: list[list[list[int]]] = []
    for sample, aim in zip(subject.samples, wanted, strict=True):
        begun = aim.prompt[len(sample.wanted.prompt) :]
        if begun and penalty is None:
            found.append([aim.prompt])
        else:
            found.append(
                _search_words(hunt, sample, aim.answer, begun, penalty, messages)
            )
        hunt.on_sample()
    for rank in range(max(map(len, found))):
        prompts = [own[min(rank, len(own) - 1)] for own in found]
        yield _ask(subject, hunt.search, prompts)


def _search_words(
    hunt: _Hunt,
    sample: Sample,
    answer: list[int],
    begun: list[int],
    penalty: Penalty | None,
    messages: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Return prompts of which an answer might come, the words that begin it with them.

    Args:
        hunt: Says how much is tried.
        sample: Whose prompt words are written into.
        answer: What is wanted behind these words.
        begun: Words that the answer begins with; others may take their places.
        penalty: What an adaptive attacker pays.
        messages: Ordinary ones, to copy words from.
    """
    subject = hunt.subject

    def can_send(prompt: list[int]) -> bool:
        end = len(prompt) - len(begun)
        try:
            write_message(subject.tokenizer, prompt[:end])
        except PromptError:
            return False
        said = subject.tokenizer.decode(prompt[end:])
        return _tokenize(subject, said) == prompt[end:]

    result = attack_prompts(
        subject.target,
        [Dialogue(sample.wanted.prompt, answer)],
        SuffixConfig(queries=hunt.queries, seed=hunt.seed),
        template=find_template(subject),
        allowed=subject.words,
        messages=messages,
        can_send=can_send,
        penalty=penalty,
        begun=begun,
        constrained=hunt.search == "constrained",
    )
    return result.finalists[0]


def _ask(subject: Subject, search: Search, prompts: Sequence[list[int]]) -> _Found:
    """Answer prompts, that each end with the words that begin its answer."""
    given = answer(subject.target, prompts, clamp=subject.target.clamp)
    ends = [
        len(prompt) - count
        for prompt, count in zip(prompts, _count_begun(subject, search), strict=True)
    ]
    asked = [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]
    begun = [prompt[end:] for prompt, end in zip(prompts, ends, strict=True)]
    if search == "constrained":  # a guard reads these words as output
        columns = zip(asked, begun, given, strict=True)
        given = [Dialogue(p, [*words, *one.answer]) for p, words, one in columns]
    return _Found(
        given,
        subject.record(given),
        [write_message(subject.tokenizer, prompt) for prompt in asked],
        [str(subject.tokenizer.decode(words)) for words in begun],
    )


def _soft(
    hunt: _Hunt, wanted: Sequence[Dialogue], penalty: Penalty | None
) -> Iterator[_Found]:
    subject = hunt.subject
    dialogues: list[Dialogue] = []
    runs: list[Recording] = []
    for sample in wanted:
        result = attack_embeddings(
            subject.target,
            [sample],
            SoftConfig(steps=hunt.queries // _TRIES_PER_STEP, seed=hunt.seed),
            template=find_template(subject),
            penalty=penalty,
        )
        dialogues += result.dialogues
        runs += record_soft(subject.target, result, subject.layers)
        hunt.on_sample()
    yield _Found(dialogues, runs)


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


def serve_prompts(
    subject: Subject, client: Client, row: PromptRow, *, seed: int
) -> Served:
    """Send the prompts of a row to a server that runs the policy.

    Answers that are begun are asked for as completions of token ids.

    Each is answered greedily and some times at temperature 1; every answer is judged by
    the predicate of all others.

    Args:
        subject: What was attacked.
        client: Of the server.
        row: Has a prompt for each sample; none whose decoding is constrained.
        seed: Of the sampled answers.

    Raises:
        EngineError: The server cannot be reached, or refuses.
        CertificateError: It answers under another version of the policy.
    """
    exchanges = deliver(
        client,
        encode_prompts(subject, row) if row.search in BEGUN else row.prompts,
        max_tokens=subject.target.max_tokens,
        samples=SAMPLED,
        policy=subject.name,
        seed=seed,
    )
    replies = [
        (wanted, reply)
        for wanted, exchange in zip(_aims(subject, row.search), exchanges, strict=True)
        for reply in exchange.replies
    ]
    _check_versions(subject, {reply.fingerprint for _, reply in replies})
    given = [
        Dialogue(wanted.prompt, _tokenize(subject, reply.text))
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
