"""What an SAE may say about itself."""

import pytest
from pydantic import ValidationError

from guard.sae.config import SaeConfig

BASE = {
    "architecture": "standard",
    "d_model": 8,
    "d_sae": 32,
    "hook_point": "layers.1.resid_post",
}


def test_the_shortest_config_has_no_pre_bias_and_no_normalisation() -> None:
    config = SaeConfig.model_validate(BASE)
    assert not config.apply_b_dec_to_input
    assert config.normalize_activations == "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk"}, "k is missing"),
        ({"architecture": "topk", "k": 33}, "expected at most d_sae, which is 32"),
        ({"k": 4}, "k is for topk only; leave it out for standard"),
        ({"hook_point": "blocks.1.hook_resid_post"}, "is not a hook point"),
        ({"hook_point": "layers.01.resid_post"}, "is not a hook point"),
        ({"d_sae": 0}, "greater than 0"),
        ({"d_sae": "32"}, "valid integer"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        SaeConfig.model_validate({**BASE, **change})


def test_a_config_cannot_be_changed() -> None:
    config = SaeConfig.model_validate(BASE)
    with pytest.raises(ValidationError):
        config.d_sae = 64  # type: ignore[misc]
