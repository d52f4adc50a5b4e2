"""An engine without a server, around an LLM that plays its part."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import save_file
from vllm_guard import context
from vllm_guard.offline import GuardedEngine, RecordingEngine

from guard.errors import EngineError
from guard.prompt import Prompt

AT = "layers.1.resid_post"
BOS, EOS = 1, 2


class Tokenizer:
    """One token a letter; a chat adds a bracket on either side."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [10 + ord(letter) for letter in text.replace("<bos>", "")]
        first = [BOS] if add_special_tokens or text.startswith("<bos>") else []
        return {"input_ids": first + ids}

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], **options: bool
    ) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return "<bos>" + "".join(f"[{message['content']}]" for message in messages)


class FakeLLM:
    """Answers `abc`, as far as it may, and ends with EOS; its rows say who they are."""

    started: list["FakeLLM"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.environment = dict(os.environ)
        self.asked: list[tuple[list[int], Any]] = []
        self.kept: dict[str, torch.Tensor] = {}
        config = SimpleNamespace(
            model=model, revision=None, dtype=torch.bfloat16, max_model_len=20
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(model_config=config)
        )
        FakeLLM.started.append(self)

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def generate(
        self, prompts: Sequence[Any], params: Sequence[Any], *, use_tqdm: bool
    ) -> list[Any]:
        assert not use_tqdm
        results = []
        for prompt, wanted in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            number = len(self.asked)
            self.asked.append((ids, wanted))
            answer = [97, 98, 99, EOS][: wanted.max_tokens]
            exempt = int(ids[0] == BOS)
            rows = len(ids) + len(answer) - 1 - exempt
            self.kept[f"{number}-ab12/{AT}"] = torch.full((rows, 3), float(number))
            verdict = {
                "readings": [{"monitor": "m", "score": len(ids), "position": 0}],
                "alarms": [],
            }
            results.append(
                SimpleNamespace(
                    request_id=str(number),
                    prompt_token_ids=ids,
                    outputs=[SimpleNamespace(token_ids=answer, guard=verdict)],
                )
            )
        return results

    def collective_rpc(self, name: str, *, args: tuple[str]) -> None:
        assert name == "guard_write_recordings"
        save_file(self.kept, args[0])
        self.kept = {}


@pytest.fixture
def policy(
    write_policy: Callable[..., Path],
    clean_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A policy file, in a process in which vLLM is played."""
    for name in ("VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", "GUARD_POLICY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(vllm, "LLM", FakeLLM)
    FakeLLM.started.clear()
    return write_policy()


def record(policy: Path, *prompts: Prompt) -> tuple[list[Any], FakeLLM]:
    engine = RecordingEngine("toy", policy, "default", max_num_seqs=3)
    (llm,) = FakeLLM.started
    return list(engine.record(prompts)), llm


def test_a_recording_says_what_of_it_is_prompt(policy: Path) -> None:
    recordings, _ = record(
        policy,
        Prompt(prompt="hi"),  # <bos> [ h i ]
        Prompt(prompt="hi", max_tokens=2),
        Prompt(text="raw"),
        Prompt(prompt="hi", response="xyz"),
        Prompt(prompt="hi", response=""),
    )
    found = [(r.prompt_length, len(r.resid[AT]), r.total_length) for r in recordings]
    assert found == [
        (4, 7, 20),
        (4, 5, 7),
        (3, 6, 20),
        (4, 7, 8),
        # An empty answer is one, and not the model's own.
        (4, 4, 5),
    ]
    for number, recording in enumerate(recordings):
        assert (recording.resid[AT] == number).all()


def test_a_prompt_without_a_bos_has_no_row_less(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Tokenizer.apply_chat_template
    monkeypatch.setattr(
        Tokenizer,
        "apply_chat_template",
        lambda *args, **options: bare(*args, **options).removeprefix("<bos>"),
    )
    ((recording,), _) = record(policy, Prompt(prompt="hi"))
    assert (recording.prompt_length, len(recording.resid[AT])) == (4, 7)


def test_requests_are_recorded_in_parts_that_fit_into_memory(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_guard.offline._CHUNK", 2)
    recordings, llm = record(policy, *[Prompt(prompt="x")] * 5)
    assert [float(r.resid[AT][0, 0]) for r in recordings] == [0, 1, 2, 3, 4]
    assert llm.kept == {}


def test_a_recording_engine_computes_every_token_and_runs_no_graph(
    policy: Path,
) -> None:
    _, llm = record(policy, Prompt(prompt="x"))
    assert llm.options["enable_prefix_caching"] is False
    assert llm.options["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert llm.options["max_num_seqs"] == 3
    assert llm.environment["GUARD_RECORD"] == "1"
    assert llm.environment["VLLM_PLUGINS"] == "guard"
    assert llm.environment["GUARD_POLICY"] == str(policy)
    (_, params) = llm.asked[0]
    assert params.temperature == 0
    assert context.get().current.policy_file.policies["default"].monitors == ()
    assert context.get().recorder is not None


def test_a_guarded_engine_records_nothing_and_tells_what_was_read(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an engine before it left.
    monkeypatch.setenv("GUARD_RECORD", "1")
    engine = GuardedEngine("toy", policy, "default")
    told = list(engine.ask([Prompt(prompt="hi", max_tokens=9), Prompt(text="raw")]))
    assert [one.scores for one in told] == [{"m": 5.0}, {"m": 4.0}]
    assert [one.total_length for one in told] == [14, 20]
    (llm,) = FakeLLM.started
    assert "GUARD_RECORD" not in llm.environment
    assert "enable_prefix_caching" not in llm.options
    assert context.get().current.policy_file.policies["default"].monitors
    assert (engine.dtype, engine.model_digest) == ("bfloat16", None)


def test_a_prompt_that_does_not_fit_is_one_line(policy: Path) -> None:
    with pytest.raises(
        EngineError, match=r"of 23 tokens does not fit into .* 20; expec"
    ):
        record(policy, Prompt(prompt="x" * 20))


def test_a_fault_of_the_guard_is_told_in_its_own_line(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        if fault:
            Path(os.environ["GUARD_FAULT_FILE"]).write_text(fault)
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(vllm, "LLM", fail)
    fault = "c.safetensors: was made for another model."
    with pytest.raises(EngineError, match=f"^{fault}$"):
        GuardedEngine("toy", policy, "default")
    fault = ""
    with pytest.raises(
        EngineError, match="vLLM cannot run 'toy' this way: Engine core"
    ):
        GuardedEngine("toy", policy, "default")
    assert "GUARD_FAULT_FILE" not in os.environ
