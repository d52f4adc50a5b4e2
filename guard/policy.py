"""The policy file: what may be asked of the guard, read once and then frozen.

`load_policy` reads YAML; whatever is wrong is one line with the file, the line and
the key. Keys that a later version acts on are known here and refused by name, so
that nobody believes in a protection that is not there.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from guard.document import Document, Location, shorten
from guard.errors import PolicyError
from guard.file import read_file

__all__ = [
    "Drill",
    "Monitor",
    "Policy",
    "PolicyFile",
    "Rule",
    "SaeSource",
    "Tenant",
    "When",
    "load_policy",
    "parse_policy",
    "read_policy",
]

Mode = Literal["observe", "enforce"]
"""`observe` computes and reports; `enforce` changes what the model does."""
Law = Literal["ablate", "set", "cap", "floor", "scale", "project"]
"""What a clamp makes of an activation z: 0, c, min(z, c), max(z, c), k * z."""
Unit = Literal["native", "unit_norm", "max"]
"""As the SAE file reports it; per unit decoder norm; in calibrated maxima."""
Scope = Literal["token", "request"]
"""Where a condition must have held: at this token, or at any so far."""
ScoreName = Literal["error_norm", "density", "error", "probe", "clamp_residual"]
"""What a monitor may watch."""
Stage = Literal["prompt", "last_prompt", "output"]
"""Which tokens of a request: those it brought, the last one of them, at which the
answer is decided, or those the model wrote."""
OnAlarm = Literal["flag", "block"]
"""What an alarm does under `enforce`; under `observe` it is reported only."""
Position = Literal["last_prompt", "all_prompt"]
"""Where a drill's edit is added: the last token of the prompt, or all of them."""

_T = TypeVar("_T")

MAX_RULES = 24
"""Clamps of one policy: each is a bit of an int32 in the engine."""
MAX_MONITORS = 32
MAX_TARGET = 0.5
"""Largest share of benign requests that the monitors of a policy may alarm on."""
MAX_DRILLS = 64
"""Drills of a file: each is a row of a table in the worker."""
MAX_FILE_BYTES = 1 << 20

_LATER: Mapping[str, frozenset[str]] = {
    "law": frozenset({"project"}),
}
"""Choices that are known to the schema and not built yet."""


def _refuse(message: str, *at: str | int, kind: str = "fault") -> NoReturn:
    """Raise what the loader shows as one line.

    Args:
        message: What is wrong; what would be right.
        at: Keys and indices from the model that is being checked to the culprit.
        kind: `fault`, or `later` for what is known but not built.
    """
    raise PydanticCustomError(kind, "{message}", {"message": message, "at": at})


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _check_name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        _refuse(
            f"{value!r} is not a name; expected 1 to 64 letters, digits, '_', '.', '-'"
        )
    return value


_RESID_POST = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.resid_post")
_RESID_PRE = re.compile(r"layers\.0\.resid_pre")
"""The one other place: every further resid_pre has the name of a resid_post."""


def _check_hook_point(value: str) -> str:
    if _RESID_POST.fullmatch(value) is None:
        _refuse(f"{value!r} is not a hook point; expected layers.<n>.resid_post")
    return value


def _check_read_point(value: str) -> str:
    if not (_RESID_PRE.fullmatch(value) or _RESID_POST.fullmatch(value)):
        _refuse(
            f"{value!r} is not a hook point; expected layers.<n>.resid_post or "
            "layers.0.resid_pre"
        )
    return value


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def _check_sha256(value: str) -> str:
    if _SHA256.fullmatch(value) is None:
        _refuse("is not a sha256; expected 64 hexadecimal digits")
    return value.lower()


def _check_finite(value: float) -> float:
    if not math.isfinite(value):
        _refuse(f"{value} is not a finite number; expected one")
    return value


def _built(field: str) -> list[str]:
    every = get_args({"law": Law}[field])
    return [choice for choice in every if choice not in _LATER[field]]


def _check_built(value: str, info: ValidationInfo) -> str:
    if value in _LATER[str(info.field_name)]:
        _refuse(
            f"{value!r} is not built yet; expected one of "
            f"{', '.join(_built(str(info.field_name)))}",
            kind="later",
        )
    return value


def _resolve(value: Path, info: ValidationInfo) -> Path:
    if not value.name or "\0" in str(value):
        _refuse(f"{shorten(str(value))} is not the path of a file or folder")
    return Path((info.context or {}).get("folder", "")) / value


def _refuse_stable(value: bool) -> bool:
    if value:
        _refuse("measuring stability is not built yet; expected false", kind="later")
    return value


def _text(format: str, *patterns: re.Pattern[str]) -> WithJsonSchema:
    """Return how the published schema tells a text that a function here checks."""
    pattern = "|".join(pattern.pattern for pattern in patterns)
    return WithJsonSchema(
        {"type": "string", "format": format, "pattern": f"^({pattern})$"}
    )


Name = Annotated[str, AfterValidator(_check_name), _text("name", _NAME)]
HookPointName = Annotated[
    str, AfterValidator(_check_hook_point), _text("hook point", _RESID_POST)
]
ReadPointName = Annotated[
    str, AfterValidator(_check_read_point), _text("hook point", _RESID_POST, _RESID_PRE)
]
Sha256 = Annotated[str, AfterValidator(_check_sha256), _text("sha256", _SHA256)]
Finite = Annotated[float, AfterValidator(_check_finite)]
FilePath = Annotated[Path, AfterValidator(_resolve)]
Latent = Annotated[int, Field(ge=0, lt=2**31)]
Latents = Annotated[tuple[Latent, ...], Field(min_length=1, max_length=4096)]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class SaeSource(_Frozen):
    """Where an SAE lies, how it is read, and the digest it must have."""

    path: FilePath
    """Folder; relative to the policy file."""
    format: Literal["guard", "sae_lens"]
    """Layout of the folder."""
    hook_point: HookPointName
    """Where it is hooked; refused when it was trained elsewhere."""
    sha256: Sha256
    """Of the weights file; checked before it is parsed."""


class When(_Frozen):
    """A condition on other latents of the same SAE, before any clamp."""

    latents: Latents
    """Any one of them above the bar is enough."""
    above: Annotated[Finite, Field(ge=0)] = 0.0
    """Activation, in the unit of the SAE file, that must be exceeded."""
    scope: Scope = "token"
    """`request`: once it held, it holds for the tokens that follow too."""


class Rule(_Frozen):
    """One entry of `clamps`: latents held by one law."""

    name: Name
    """Its name in verdicts and metrics."""
    sae: Name
    """Key of `saes`."""
    latents: Latents
    """Indices of the latents that are held."""
    law: Annotated[
        Law,
        AfterValidator(_check_built),
        WithJsonSchema({"enum": _built("law")}),
    ]
    """What is done to each activation."""
    value: Finite | None = None
    """The constant of the law; `ablate` has none."""
    if_active: bool = False
    """Only where the latent is active; with `set` only."""
    unit: Unit = "native"
    """In which unit `value` is given."""
    when: When | None = None
    """Left out: always."""

    @model_validator(mode="after")
    def _check_law(self) -> Self:
        if self.law == "ablate" and self.value is not None:
            _refuse("law ablate takes no value; leave it out", "value")
        if self.law != "ablate" and self.value is None:
            _refuse(f"law {self.law} needs a value", "law")
        if self.if_active and self.law != "set":
            _refuse(f"goes with law set, not {self.law}; leave it out", "if_active")
        if self.unit != "native" and self.law in {"ablate", "scale"}:
            _refuse(f"law {self.law} has no unit; leave it out", "unit")
        if twice := _first_repeat(self.latents):
            _refuse(f"latent {twice[1]} is listed twice", "latents", twice[0])
        return self


class Monitor(_Frozen):
    """One entry of `monitors`: a score with its threshold and what an alarm does."""

    name: Name
    """Its name in verdicts and metrics."""
    score: ScoreName
    """What is watched."""
    sae: Name | None = None
    """Key of `saes`; the score is taken at its hook point, after the clamps."""
    hook_point: ReadPointName | None = None
    """Where else `density` and `probe` are taken, which need no SAE. At
    `layers.0.resid_pre` a score sees each token by itself, and nothing around it."""
    probe: FilePath | None = None
    """Weights that `guard probe train` wrote; a calibration takes them along."""
    stage: Stage | None = None
    """Left out: every token counts."""
    window: Annotated[int, Field(ge=1, le=64)] = 1
    """The mean over this many consecutive tokens is held against the threshold."""
    drift: Annotated[Finite, Field(gt=0)] | None = None
    """Instead of a mean, evidence that adds up: the sum of how far each token's score
    exceeds this much is held against the threshold, and falls again, never below 0,
    where scores are less (the CUSUM of Page, "Continuous inspection schemes", 1954)."""
    calibration: FilePath | None = None
    """Thresholds fitted on benign traffic; relative to the policy file."""
    target_fpr: Annotated[Finite, Field(gt=0, le=MAX_TARGET)]
    """Share of benign requests that may alarm. Monitors of a policy that share a
    calibration and an action share their budgets: that any of them alarms has at most
    the sum as its probability."""
    on_alarm: OnAlarm
    """What an alarm does."""

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        stands_alone = self.score in {"density", "probe"}
        if self.sae is None and not stands_alone:
            _refuse(f"score {self.score} needs an SAE; expected a key of saes", "sae")
        if self.hook_point is not None and not stands_alone:
            _refuse(
                f"score {self.score} is read at its SAE; leave it out", "hook_point"
            )
        if (self.sae is None) == (self.hook_point is None):
            _refuse("expected either sae or hook_point", "score")
        if self.score == "probe" and self.probe is None:
            _refuse("score probe needs a probe; expected the path of one", "score")
        if self.score != "probe" and self.probe is not None:
            _refuse(f"goes with score probe, not {self.score}; leave it out", "probe")
        if self.drift is not None and self.window > 1:
            _refuse("goes without a window; leave out one of the two", "drift")
        if self.calibration is None:
            _refuse(
                f"score {self.score} needs a calibration; expected the path of one",
                "score",
            )
        return self


class Policy(_Frozen):
    """What one request runs under."""

    mode: Mode = "enforce"
    """Whether the guard acts or only reports.

    Under `observe` no clamp changes anything and no alarm stops anything. What is read
    at a clamped hook point is read as if it had been clamped; what lies behind it flows
    unclamped, and is read so.
    """
    hold_tokens: Annotated[int, Field(ge=0, le=1024)] = 0
    """How many of the last tokens are kept back while an answer grows.

    An alarm that comes this many tokens late still stops them. The price: the first
    token leaves this many steps later, and so is a stop string found; an alarm on what
    the model computes in between blocks too. Without effect under `observe`, where
    nothing can be stopped.
    """
    constrained_decoding: Literal["allow", "refuse"] = "allow"
    """Whether a client may constrain which tokens are decoded.

    Monitors are calibrated on answers that the model gives freely. `refuse` answers 400
    to `structured_outputs`, a `response_format` other than text, a `tool_choice` that
    demands a call, `logit_bias`, `allowed_token_ids`, `bad_words`,
    `thinking_token_budget`, `stop_token_ids` beside `min_tokens`, and `vllm_xargs`,
    which are for samplers; under `observe` too. Penalties and temperature stay the
    client's.
    """
    clamps: Annotated[tuple[Rule, ...], Field(max_length=MAX_RULES)] = ()
    """Applied in this order, all to the activations of the untouched stream."""
    monitors: Annotated[tuple[Monitor, ...], Field(max_length=MAX_MONITORS)] = ()
    """Thresholds are set jointly; the worst action is taken."""
    certificate: FilePath | None = None
    """What `guard certify` found out about it; relative to the policy file. Refused
    where it was issued for another policy."""

    @model_validator(mode="after")
    def _check_entries(self) -> Self:
        for key, entries in (("clamps", self.clamps), ("monitors", self.monitors)):
            if twice := _first_repeat(entry.name.lower() for entry in entries):
                _refuse(
                    f"{twice[1]!r} is already the name of another",
                    key,
                    twice[0],
                    "name",
                )
        if sum(monitor.target_fpr for monitor in self.monitors) > MAX_TARGET:
            _refuse(
                f"their target_fpr add up to more than {MAX_TARGET}, the false alarms "
                "of the policy; expected less",
                "monitors",
            )
        held: dict[tuple[str, int], str] = {}
        for index, rule in enumerate(self.clamps):
            for latent in rule.latents:
                first = held.setdefault((rule.sae, latent), rule.name)
                if first != rule.name:
                    _refuse(
                        f"latent {latent} of {rule.sae} is already held by {first!r}; "
                        "a latent may be clamped once",
                        "clamps",
                        index,
                        "latents",
                    )
        return self


class Drill(_Frozen):
    """A stored recovery edit, added to a request that an administrator names it in."""

    name: Name
    """What a request names."""
    sae: Name
    """Key of `saes`; the edit is added behind its clamps."""
    delta: FilePath
    """The edit, as `guard.drill.save_edit` writes it; relative to the policy file."""
    position: Position = "last_prompt"
    """Which tokens it is added to; refused when it was found for others."""


class Tenant(_Frozen):
    """Who may use which policies."""

    api_key_sha256: Sha256
    """Of the key; the key itself is never written down."""
    policies: Annotated[tuple[Name, ...], Field(min_length=1)]
    """What its requests may name; the first is what they run under unasked."""


def _only_default(data: dict[str, Any]) -> tuple[str, ...]:
    return (data["default_policy"],)


class PolicyFile(_Frozen):
    """A whole policy file, as `load_policy` reads it."""

    version: Literal[1]
    """Of the file format."""
    max_policies: Annotated[int, Field(ge=1, le=1024)] = 16
    """Slots that the engine reserves; more policies are an error."""
    require_stable: Annotated[
        bool, AfterValidator(_refuse_stable), WithJsonSchema({"const": False})
    ] = False
    """Refuse clamps on latents that another SAE seed would not find."""
    allow_unverified_model: bool = False
    """Serve a model class whose stream convention was never checked."""
    on_error: Literal["closed", "open"] = "closed"
    """What happens to a request whose readings cannot be had, or are not finite."""
    unscored: OnAlarm = "block"
    """What happens to tokens whose scores cannot be known."""
    saes: Mapping[Name, SaeSource] = Field(default_factory=dict)
    """By the name that rules and monitors use."""
    policies: Annotated[Mapping[Name, Policy], Field(min_length=1)]
    """By the name that requests use; slot i is the i-th, slot 0 is no policy."""
    drills: Annotated[tuple[Drill, ...], Field(max_length=MAX_DRILLS)] = ()
    """Fire drills; drill i is the i-th, counted from 1, 0 is no drill."""
    tenants: tuple[Tenant, ...] = ()
    """Who may use what; a key that is nobody's may use what is public."""
    default_policy: Name
    """What a request without a tenant runs under unasked, or without a ticket."""
    public_policies: tuple[Name, ...] = Field(default_factory=_only_default)
    """What a client without a tenant may name; only the default when left out."""

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if len(self.policies) > self.max_policies:
            _refuse(
                f"{len(self.policies)} policies; expected at most max_policies, "
                f"which is {self.max_policies}",
                "policies",
            )
        for key, names in (("saes", self.saes), ("policies", self.policies)):
            if twice := _first_repeat(name.lower() for name in names):
                _refuse(
                    "differs from another name in case only", key, list(names)[twice[0]]
                )
        sources = [(source.sha256, source.hook_point) for source in self.saes.values()]
        if twin := _first_repeat(sources):
            first = list(self.saes)[sources.index(twin[1])]
            _refuse(
                f"is the same SAE as {first!r}; name it once, so that a latent is "
                "clamped once",
                "saes",
                list(self.saes)[twin[0]],
            )
        for at, name in _used_saes(self.policies):
            if name not in self.saes:
                _refuse(f"{name!r} is not in saes; {_offer(self.saes)}", *at)
        if self.default_policy not in self.policies:
            _refuse(
                f"{self.default_policy!r} is not in policies; {_offer(self.policies)}",
                "default_policy",
            )
        self._check_public()
        self._check_tenants()
        self._check_drills()
        return self

    def hook_point(self, monitor: Monitor) -> str:
        """Return where a monitor of one of the policies reads."""
        if monitor.sae is not None:
            return self.saes[monitor.sae].hook_point
        return str(monitor.hook_point)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Every place that a clamp or a monitor needs, each once."""
        found: dict[str, None] = {}
        for policy in self.policies.values():
            found |= {self.saes[rule.sae].hook_point: None for rule in policy.clamps}
            found |= {self.hook_point(one): None for one in policy.monitors}
        found |= {self.saes[drill.sae].hook_point: None for drill in self.drills}
        return tuple(found)

    def for_recording(self) -> Self:
        """Return the file that calibrations are recorded under.

        Its policies have no monitors yet, and are uncertified; and each enforces, so
        that what is recorded lies behind its clamps.
        """
        own = {"monitors": (), "certificate": None, "mode": "enforce"}
        policies = {
            name: policy.model_copy(update=own)
            for name, policy in self.policies.items()
        }
        return self.model_copy(update={"policies": policies})

    def _check_public(self) -> None:
        self._checkoffer(self.public_policies, "public_policies")
        if self.default_policy not in self.public_policies:
            _refuse(
                f"default_policy {self.default_policy!r} is missing; add it",
                "public_policies",
            )

    def _check_tenants(self) -> None:
        for index, tenant in enumerate(self.tenants):
            self._checkoffer(tenant.policies, "tenants", index, "policies")
        if twice := _first_repeat(tenant.api_key_sha256 for tenant in self.tenants):
            _refuse(
                "is the key of another tenant already; expected one entry per key",
                *("tenants", twice[0], "api_key_sha256"),
            )

    def _check_drills(self) -> None:
        for index, drill in enumerate(self.drills):
            if drill.sae not in self.saes:
                offer = _offer(self.saes)
                _refuse(
                    f"{drill.sae!r} is not in saes; {offer}", "drills", index, "sae"
                )
        if twice := _first_repeat(drill.name.lower() for drill in self.drills):
            _refuse(
                f"{twice[1]!r} is already the name of another",
                *("drills", twice[0], "name"),
            )

    def _checkoffer(self, names: tuple[str, ...], *at: str | int) -> None:
        for index, name in enumerate(names):
            if name not in self.policies:
                offer = _offer(self.policies)
                _refuse(f"{name!r} is not in policies; {offer}", *at, index)
        if twice := _first_repeat(names):
            _refuse(f"{twice[1]!r} is listed twice", *at, twice[0])


def load_policy(path: str | Path) -> PolicyFile:
    """Read and check a policy file.

    Relative paths in it are taken from its own folder. The files they name are not
    opened here.

    Raises:
        PolicyError: One line, `policy.yaml:12: policies.default.clamps[0].law: ...`.
    """
    path = Path(path)
    return parse_policy(read_policy(path), path)


def read_policy(path: Path) -> bytes:
    """Read the content of a policy file, whatever it is.

    Raises:
        PolicyError: It cannot be read, or is too large.
    """
    try:
        return read_file(path, limit=MAX_FILE_BYTES)
    except OSError as error:
        raise PolicyError(
            f"{path}: cannot be read ({error.strerror}); expected a policy file"
        ) from error


def parse_policy(content: bytes, path: Path) -> PolicyFile:
    """Check the content of a policy file, as `load_policy` does.

    Args:
        content: As it stood in the file once.
        path: Where that was; it may hold something else by now.

    Raises:
        PolicyError: One line, as from `load_policy`.
    """
    document = Document(str(path), content)
    try:
        return PolicyFile.model_validate_json(
            json.dumps(document.value),
            strict=True,
            context={"folder": path.parent},
        )
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise document.fault(faults, explain=_explain) from error


def _used_saes(
    policies: Mapping[str, Policy],
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    for name, policy in policies.items():
        entries: tuple[tuple[str, Iterable[Rule | Monitor]], ...] = (
            ("clamps", policy.clamps),
            ("monitors", policy.monitors),
        )
        for key, users in entries:
            for index, user in enumerate(users):
                if user.sae is not None:
                    yield ("policies", name, key, index, "sae"), user.sae


def _first_repeat(values: Iterable[_T]) -> tuple[int, _T] | None:
    seen: set[_T] = set()
    for index, value in enumerate(values):
        if value in seen:
            return index, value
        seen.add(value)
    return None


def _offer(names: Iterable[str]) -> str:
    known = ", ".join(names)
    return f"expected one of {known}" if known else "it is empty"


_NOUNS: Mapping[str, str] = {
    "version": "a version this guard reads",
    "format": "an SAE format",
    "mode": "a mode",
    "law": "a law",
    "unit": "a unit",
    "scope": "a scope",
    "score": "a score",
    "stage": "a stage",
    "on_alarm": "an action",
    "unscored": "an action",
    "on_error": "a choice",
    "constrained_decoding": "a choice",
    "position": "a position",
}


def _explain(error: ErrorDetails) -> str:
    kind, given = error["type"], error["input"]
    key = str(error["loc"][-1]) if error["loc"] else ""
    context = error.get("ctx", {})
    if kind in {"fault", "later"}:
        return str(context["message"])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(key, _model_at(error['loc'][:-1]))}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "").replace(" or ", ", ")
        expected = ", ".join(_built(key)) if key in _LATER else expected
        several = "one of " if "," in expected else ""
        return f"{shorten(given)} is not {_NOUNS[key]}; expected {several}{expected}"
    if kind == "too_long":
        return f"{context['actual_length']} entries; expected {context['max_length']}"
    if kind == "too_short":
        return f"is empty; expected at least {context['min_length']} entry"
    return error["msg"].replace("Input", shorten(given), 1)


def _model_at(location: Location) -> type[BaseModel]:
    models: Mapping[str | int, type[BaseModel]] = {
        "saes": SaeSource,
        "policies": Policy,
        "clamps": Rule,
        "monitors": Monitor,
        "when": When,
        "tenants": Tenant,
        "drills": Drill,
    }
    # Every second part is a name or an index; a policy may well be named 'when'.
    return models[location[::2][-1]] if location else PolicyFile


def _suggest(key: str, model: type[BaseModel]) -> str:
    close = get_close_matches(key, model.model_fields, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(model.model_fields)}"
