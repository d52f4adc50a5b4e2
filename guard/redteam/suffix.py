"""The prompt attacker: a few words that bring suppressed answers back.

All that a client can do is write. A greedy coordinate gradient search over the words of
a suffix (arXiv 2307.15043, algorithm 1), counted in queries, with five additions: the
words may stand before the message; the best few are changed, not the best one; now and
then more than one word is, or one is moved; some are copied in a run from what other
clients write, because a guard may know random words; and nothing is asked twice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guard.errors import PromptError
from guard.redteam.objective import Judgement, Objective, places
from guard.redteam.target import Dialogue, Target, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guard.redteam.evasion import Penalty
    from guard.redteam.objective import Placement, Template

__all__ = ["Attempt", "SuffixConfig", "SuffixResult", "attack_prompts"]

_PATIENCE = 5
"""How often, per candidate, something may be drawn that was judged before."""


@dataclass(frozen=True, slots=True)
class SuffixConfig:
    """How an attacker searches for words."""

    length: int = 8
    """How many words are written."""
    placement: Placement = "prefix"
    """Where they are written."""
    queries: int = 2000
    """Candidates that are judged for a sample at most, each by one forward pass; the
    gradient, at prompts that were judged before, is not counted."""
    candidates: int = 64
    """Judged per step."""
    parents: int = 8
    """Best suffixes so far that candidates are changes of."""
    top_k: int = 32
    """Replacements per position that the gradient proposes."""
    another: float = 0.3
    """Probability that a candidate changes one more position, again and again."""
    moved: float = 0.25
    """Share of candidates in which a word moves to another place instead, half of the
    time as another word."""
    copied: float = 0.25
    """Share of candidates in which a run of words is copied from ordinary messages,
    where there are any, and of half of the random ones the whole."""
    restarts: int = 1
    """Searches from new random suffixes, which share the queries."""
    seed: int = 0
    """Of all that is drawn; each sample draws alike, whatever others there are."""


@dataclass(frozen=True, slots=True)
class SuffixResult:
    """The best suffix found for each sample, and what it does."""

    config: SuffixConfig
    """How it was searched for."""
    prompts: list[list[int]]
    """Token ids of each prompt with its suffix."""
    finalists: list[list[list[int]]]
    """The last parents of each sample as such prompts, the best first. A judge may see
    more in one of them than a search, which asks for every token and for a margin."""
    dialogues: list[Dialogue]
    """Each such prompt with the greedy answer under the clamp."""
    recovered: list[bool]
    """Whether that is the suppressed answer, token for token."""
    loss: list[float]
    """Mean cross-entropy of the suppressed answer's tokens, the penalty included."""
    penalty: list[float]
    """The penalty alone; 0 for a suffix that stays unseen, and without a penalty."""
    queries: list[int]
    """Candidates judged for each sample, until it succeeded or had no more."""

    @property
    def succeeded(self) -> list[bool]:
        """Whether the suppressed answer came, and nothing was paid for it."""
        pairs = zip(self.recovered, self.penalty, strict=True)
        return [back and paid == 0 for back, paid in pairs]

    @property
    def recovery_rate(self) -> float:
        """Recovered samples, as a share of all."""
        return sum(self.recovered) / len(self.recovered)


class Attempt(NamedTuple):
    """One step of the search for one sample; what `on_step` is told."""

    sample: int
    """Index of the sample."""
    tokens: Tensor
    """The candidates, `[num, length]`."""
    judgement: Judgement
    """What came of each."""


def attack_prompts(
    target: Target,
    wanted: Sequence[Dialogue],
    config: SuffixConfig,
    *,
    template: Template,
    allowed: Sequence[int],
    messages: Sequence[Sequence[int]] = (),
    can_send: Callable[[list[int]], bool] = lambda prompt: True,
    penalty: Penalty | None = None,
    begun: Sequence[int] = (),
    constrained: bool = False,
    on_step: Callable[[Attempt], object] = lambda attempt: None,
    batch_size: int = 64,
) -> SuffixResult:
    """Search words for each prompt that bring its suppressed answer back.

    A sample's search ends as soon as the answer comes and nothing is paid. A batch is
    made of candidates for one sample: they are equally long.

    Args:
        target: The clamped model.
        wanted: Prompts with the answers that the clamp suppressed.
        config: How to search.
        template: What of each prompt is not the client's.
        allowed: Token ids that a client can write.
        messages: Ordinary ones, as token ids, that words may be copied from.
        can_send: Whether some text becomes exactly this prompt. What no client can
            send is not tried.
        penalty: What an adaptive attacker pays to stay unseen.
        begun: Words that the answer begins with where a search begins; as many of the
            suffix stand there, behind the whole prompt.
        constrained: Whether a guard takes those for output, as where decoding is
            constrained to them; for a part of the prompt otherwise.
        on_step: Called for all candidates that were judged at once.
        batch_size: Candidates per forward pass.

    Raises:
        ValueError: There is nothing to attack, no word to write, no place, or no query.
        PromptError: Nothing that was drawn can be sent.
    """
    if not wanted:
        raise ValueError("No sample to attack; expected at least one valid sample.")
    if not allowed or config.length < 1:
        raise ValueError(
            f"No suffix has {config.length} of {len(allowed)} tokens; expected at "
            "least one of each."
        )
    if config.queries < config.restarts or config.restarts < 1:
        raise ValueError(
            f"{config.queries} queries for {config.restarts} restarts; expected at "
            "least one for each."
        )
    objectives = [
        Objective(
            target,
            sample,
            places=places(
                config.placement,
                sample.prompt,
                length=config.length,
                template=template,
            )
            + [0] * len(begun),
            penalty=penalty,
            said=len(begun) if constrained else 0,
        )
        for sample in wanted
    ]
    found, finalists, queries = [], [], []
    for number, objective in enumerate(objectives):
        search = _Search(
            objective, config, allowed, messages, can_send, begun, batch_size
        )
        for tokens, judgement in search.run():
            on_step(Attempt(number, tokens, judgement))
        if not search.best:
            raise PromptError(
                f"No prompt of {config.length} drawn words can be sent; expected a "
                "tokenizer that makes the same tokens of their text."
            )
        found.append(search.best[0])
        finalists.append([objective.prompt(one.tokens) for one in search.best])
        queries.append(search.queries)
    prompts = [own[0] for own in finalists]
    given = answer(target, prompts, clamp=target.clamp)
    pairs = zip(given, wanted, strict=True)
    return SuffixResult(
        config=config,
        prompts=prompts,
        finalists=finalists,
        dialogues=given,
        recovered=[one.answer == want.answer for one, want in pairs],
        loss=[one.loss for one in found],
        penalty=[one.penalty for one in found],
        queries=queries,
    )


class _Suffix(NamedTuple):
    """A suffix that was judged."""

    failed: bool
    """Whether the answer stayed away, or something was paid for it."""
    loss: float
    """The penalty included."""
    penalty: float
    tokens: tuple[int, ...]


class _Search:
    """The search for one sample, over all restarts."""

    def __init__(
        self,
        objective: Objective,
        config: SuffixConfig,
        allowed: Sequence[int],
        messages: Sequence[Sequence[int]],
        can_send: Callable[[list[int]], bool],
        begun: Sequence[int],
        batch_size: int,
    ) -> None:
        """Know the sample; nothing is asked yet."""
        self._can_send, self._begun = can_send, list(begun)
        self._length = config.length + len(begun)
        self._objective, self._config, self._batch_size = objective, config, batch_size
        self._allowed = torch.tensor(sorted(set(allowed)))
        self._said = torch.tensor([token for text in messages for token in text])
        self._generator = torch.Generator().manual_seed(config.seed)
        self._asked: set[tuple[int, ...]] = set()
        self.best: list[_Suffix] = []
        """As many of all restarts so far as there are parents, the best first."""

    @property
    def queries(self) -> int:
        """How many were judged so far: nothing is judged twice."""
        return len(self._asked)

    def run(self) -> Iterator[tuple[Tensor, Judgement]]:
        """Search to the end, yielding what was judged."""
        config = self._config
        for restart in range(1, config.restarts + 1):
            limit = config.queries * restart // config.restarts
            parents: list[_Suffix] = []
            while self.queries < limit:
                tokens = self._propose(parents, limit - self.queries)
                if not len(tokens):
                    return
                judgement = self._objective.judge(tokens, batch_size=self._batch_size)
                read = _read(tokens, judgement)
                parents = sorted([*parents, *read])[: config.parents]
                self.best = sorted([*self.best, *read])[: config.parents]
                yield tokens, judgement
                if not self.best[0].failed:
                    return

    def _propose(self, parents: Sequence[_Suffix], most: int) -> Tensor:
        """Return candidates that were not judged yet, `[num, length]`.

        Changes of the parents that their gradients propose; where there are no more of
        them, and at the beginning, random ones.
        """
        config = self._config
        chosen: list[list[int]] = []
        draws: list[Callable[[], list[int]]] = [self._draw]
        if parents:
            draws.insert(0, self._changes(parents))
        for draw in draws:
            for _ in range(_PATIENCE * config.candidates):
                if len(chosen) == min(config.candidates, most):
                    break
                tokens = draw()
                if tuple(tokens) in self._asked:
                    continue
                if self._can_send(self._objective.prompt(tokens)):
                    self._asked.add(tuple(tokens))
                    chosen.append(tokens)
        return torch.tensor(chosen, dtype=torch.int64).view(-1, self._length)

    def _draw(self) -> list[int]:
        """Return random words, or some of an ordinary message; and how it is begun."""
        length = self._config.length
        if self._copies(0.5):
            return self._copy(length) + self._begun
        return self._pick(self._allowed, length) + self._begun

    def _copies(self, probability: float) -> bool:
        """Whether words are copied this time; never where too few are to be had."""
        return len(self._said) >= self._length and self._happens(probability)

    def _copy(self, count: int) -> list[int]:
        """Return consecutive words of what others write."""
        start = self._number(len(self._said) - count + 1)
        return self._said[start : start + count].tolist()

    def _number(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._generator))

    def _happens(self, probability: float) -> bool:
        return bool(torch.rand((), generator=self._generator) < probability)

    def _changes(self, parents: Sequence[_Suffix]) -> Callable[[], list[int]]:
        """Return what draws changes, of one parent after the other."""
        config = self._config
        tokens = torch.tensor([parent.tokens for parent in parents])
        effect = self._objective.differentiate(tokens)[:, :, self._allowed]
        count = min(config.top_k, len(self._allowed))
        best = self._allowed[effect.topk(count, dim=2, largest=False).indices]
        turns = itertools.cycle(zip(tokens.tolist(), best, strict=True))

        def draw() -> list[int]:
            parent, replacements = next(turns)
            changed = list(parent)
            if self._copies(config.copied):
                count = 1 + self._number(len(changed))
                start = self._number(len(changed) - count + 1)
                changed[start : start + count] = self._copy(count)
                return changed
            order = torch.randperm(len(changed), generator=self._generator).tolist()
            if len(order) > 1 and self._happens(config.moved):
                word = changed.pop(order[0])
                (other,) = self._pick(self._allowed, 1)
                changed.insert(order[1], other if self._happens(0.5) else word)
                return changed
            for position in order:
                (changed[position],) = self._pick(replacements[position], 1)
                if not self._happens(config.another):
                    break
            return changed

        return draw

    def _pick(self, tokens: Tensor, count: int) -> list[int]:
        drawn = torch.randint(len(tokens), (count,), generator=self._generator)
        return tokens[drawn].tolist()


def _read(tokens: Tensor, judgement: Judgement) -> list[_Suffix]:
    """Return candidates `[num, length]` with what came of them."""
    columns = (~judgement.succeeded, judgement.loss, judgement.penalty, tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        _Suffix(failed, loss, penalty, tuple(words))
        for failed, loss, penalty, words in rows
    ]
