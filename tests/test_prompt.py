"""Files of prompts: what is read, what is refused, and how they are dealt."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import PromptError
from guard.prompt import Prompt, digest_prompts, read_prompts, split_prompts

GOOD = '{"prompt": "hello"}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_key_of_a_line_is_read(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    lines = [
        {"prompt": "höre", "max_tokens": 7, "label": 1, "group": "g"},
        {"messages": messages, "response": "hi", "label": 0},
        {"text": ""},
    ]
    path = write(tmp_path, *(json.dumps(line) for line in lines), "", "  ")
    first, second, third = read_prompts(path)
    assert first.conversation == [{"role": "user", "content": "höre"}]
    assert (first.max_tokens, first.label, first.group) == (7, 1, "g")
    assert second.conversation == messages
    assert (second.response, second.label, second.max_tokens) == ("hi", 0, 128)
    assert (third.text, third.conversation, third.response) == ("", [], None)


def test_a_line_ends_where_its_json_does(tmp_path: Path) -> None:
    said = "a\u2028b\x85c"
    line = json.dumps({"prompt": said}, ensure_ascii=False)
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(f"{line}\r\n{line}".encode())
    assert [prompt.prompt for prompt in read_prompts(path)] == [said, said]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hello", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ("{}", "expected one of 'prompt', 'messages' and 'text'"),
        ('{"prompt": "a", "text": "b"}', "expected one of 'prompt', 'messages'"),
        ('{"messages": []}', "expected one of"),
        ('{"prompt": 3}', "prompt: Input should be a valid string"),
        ('{"prompt": "a", "promt": "b"}', "promt: Extra inputs are not permitted"),
        ('{"prompt": "a", "label": 2}', "label: Input should be less than or equal"),
        ('{"prompt": "a", "label": "1"}', "label: Input should be a valid integer"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: Input should be greater"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens: Input should be a valid"),
        ('{"messages": [{"role": 1}]}', "messages.0.role: Input should be a valid str"),
        ('{"prompt": "a"', "Invalid JSON"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(
    tmp_path: Path, line: str, words: str
) -> None:
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert message.endswith('expected e.g. {"prompt": "...", "max_tokens": 64}.')
    assert "\n" not in message


def test_what_a_line_says_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        read_prompts(write(tmp_path, '{"prompt": "secret", "labl": "secret"}'))
    assert "secret" not in str(caught.value)


def test_a_file_that_holds_no_prompts_is_one_line(tmp_path: Path) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes(b'{"prompt": "\xe9"}')
    for path, words in (
        (write(tmp_path, "", " "), "holds no prompt; expected one JSON object a line"),
        (tmp_path / "nowhere", "cannot be read"),
        (tmp_path, "cannot be read"),
        (latin, "expected JSON lines in UTF-8"),
    ):
        with pytest.raises(PromptError, match=words) as caught:
            read_prompts(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@given(
    groups=st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1),
    share=st.sampled_from([0.0, 1 / 3, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_every_prompt_is_dealt_once_and_whole_groups_together(
    groups: list[str | None], share: float, seed: int
) -> None:
    prompts = [Prompt(prompt=f"{i}", group=group) for i, group in enumerate(groups)]
    first, second = split_prompts(prompts, share, seed=seed)
    assert sorted([*first, *second], key=repr) == sorted(prompts, key=repr)
    shared = {prompt.group for prompt in first} & {prompt.group for prompt in second}
    assert shared <= {None}
    assert (first, second) == split_prompts(prompts, share, seed=seed)
    largest = max((groups.count(g) for g in set(groups) - {None}), default=1)
    assert share * len(prompts) <= len(first) < share * len(prompts) + max(largest, 1)


def test_another_seed_deals_and_orders_otherwise() -> None:
    prompts = [Prompt(prompt=f"{i}") for i in range(40)]
    one, other = (split_prompts(prompts, 0.5, seed=seed) for seed in (0, 1))
    assert set(one[0]) != set(other[0])
    assert one[0] != sorted(one[0], key=prompts.index)


def test_a_digest_tells_prompts_apart_by_content_and_order() -> None:
    prompts = [Prompt(prompt="a"), Prompt(prompt="b", max_tokens=3)]
    digest = digest_prompts(prompts)
    assert digest == digest_prompts(list(prompts))
    others = [
        prompts[::-1],
        prompts[:1],
        [Prompt(text="a"), prompts[1]],
        [prompts[0], Prompt(prompt="b", max_tokens=4)],
    ]
    assert len({digest, *map(digest_prompts, others)}) == 5
