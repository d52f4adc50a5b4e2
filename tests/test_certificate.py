"""A certificate says which policy it is about, and is not passed off as another's."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.limits import fuzz
from hypothesis import given
from hypothesis import strategies as st
from redteam.paper import make_certificate, make_subject
from specimens import make_policy_file, write_certificate

from guard.certificate import (
    Attestation,
    certificate_id,
    load_certificates,
    read_certificate,
)
from guard.errors import CertificateError
from guard.fingerprint import fingerprint
from guard.policy import Policy, PolicyFile

ISSUED_FOR = "ab" * 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "certificate.json"


def refusal(path: Path) -> str:
    """The one line without the path."""
    with pytest.raises(CertificateError) as caught:
        read_certificate(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_a_certificate_says_which_it_is_for_whom_and_of_when(path: Path) -> None:
    found = write_certificate(path, ISSUED_FOR, issued="2026-07-25")
    assert read_certificate(path) == Attestation(
        id=found, policy_fingerprint=ISSUED_FOR, issued="2026-07-25"
    )


def test_an_id_is_the_hash_of_everything_else_whatever_its_order() -> None:
    text = b'{"a":[1,{"b":0.05,"c":null}],"issued":"\\u00e9"}'
    said = {"issued": "é", "id": "anything", "a": [1, {"c": None, "b": 0.05}]}
    assert certificate_id(said) == hashlib.sha256(text).hexdigest()


def test_a_certificate_may_be_laid_out_anew(path: Path) -> None:
    write_certificate(path, ISSUED_FOR)
    found = read_certificate(path)
    turned = dict(reversed(json.loads(path.read_text()).items()))
    path.write_text(json.dumps(turned, indent=4))
    assert read_certificate(path) == found


def test_what_was_certified_is_read_as_it_was_written(path: Path) -> None:
    made = make_certificate(subject=make_subject(policy_fingerprint=ISSUED_FOR))
    own = certificate_id(made.model_dump(mode="json"))
    path.write_text(made.model_copy(update={"id": own}).model_dump_json(indent=2))
    assert read_certificate(path).id == own
    path.write_text(made.model_dump_json())
    assert "was changed since it was issued" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.update(id="0" * 64),
        lambda said: said.update(issued="2026-07-26"),
        lambda said: said.update(more=1),
        lambda said: said["subject"].update(policy_fingerprint="c" * 64),
        lambda said: said["cells"][0].update(budget=0.2),
        lambda said: said["cells"].pop(),
    ],
)
def test_a_certificate_that_was_changed_is_refused(
    change: Callable[[dict[str, Any]], object], path: Path
) -> None:
    write_certificate(path, ISSUED_FOR, cells=[{"budget": 0.1}])
    read_certificate(path)
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    assert refusal(path) == (
        "was changed since it was issued; expected it as `guard certify` wrote it."
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "its content is missing or not valid"),
        (b"{}", "its id is missing"),
    ],
)
def test_what_is_no_certificate_is_one_clear_line(
    content: bytes, words: str, path: Path
) -> None:
    path.write_bytes(content)
    said = refusal(path)
    assert said.startswith(words)
    assert said.endswith("; expected what `guard certify` writes.")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"issued": None}, "issued"),
        ({"issued": "yesterday"}, "issued"),
        ({"issued": "2026-07-25\n"}, "issued"),
        ({"subject": None}, "subject"),
        ({"subject": {}}, "subject.policy_fingerprint"),
        ({"subject": {"policy_fingerprint": 7}}, "subject.policy_fingerprint"),
        ({"subject": {"policy_fingerprint": "ab"}}, "subject.policy_fingerprint"),
    ],
)
def test_a_key_that_is_not_as_it_should_be_is_named(
    values: dict[str, Any], name: str, path: Path
) -> None:
    write_certificate(path, ISSUED_FOR, **values)
    assert refusal(path).startswith(f"its {name} is missing or not valid; expected")


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.json"):
        assert refusal(path).startswith("cannot be read (")


@fuzz
@given(data=st.data(), byte=st.integers(0, 255))
def test_one_byte_changed_is_refused_in_one_line_or_says_the_same(
    data: st.DataObject, byte: int, path: Path
) -> None:
    write_certificate(path, ISSUED_FOR)
    known = read_certificate(path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = byte
    path.write_bytes(content)
    try:
        assert read_certificate(path) == known
    except CertificateError:
        refusal(path)


def certified(**paths: Path) -> PolicyFile:
    """Return policies that differ, each with its certificate, and `bare` without."""
    policies = {
        name: Policy(hold_tokens=count, certificate=path)
        for count, (name, path) in enumerate(paths.items(), start=1)
    }
    return make_policy_file(policies | {"bare": Policy()}, saes={})


def test_each_policy_has_its_own_certificate_or_none(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("p", "q")}
    policy_file = certified(**paths)
    issued = {
        name: write_certificate(path, fingerprint(policy_file, name))
        for name, path in paths.items()
    }
    found = load_certificates(policy_file)
    assert {name: one.id for name, one in found.items()} == issued


def test_a_certificate_of_another_policy_is_one_clear_line(path: Path) -> None:
    policy_file = certified(p=path, q=path)
    own, other = (fingerprint(policy_file, name) for name in ("p", "q"))
    write_certificate(path, own)
    with pytest.raises(CertificateError) as caught:
        load_certificates(policy_file)
    assert str(caught.value) == (
        f"{path}: was issued for policy fingerprint {own[:12]}..., that of 'q' is "
        f"{other[:12]}...; certify it again, or leave 'certificate' out."
    )
