"""Batches, and deltas that stand behind the clamp on the rows they are meant for."""

import torch

from guard.redteam.forward import Delta, Edit, batches, pad_left, place, record


def test_every_sequence_is_in_one_batch_of_its_own_length():
    sequences = [[1] * length for length in (5, 2, 9, 1, 4)]
    assert list(batches(sequences, 2)) == [[3, 1], [4, 0], [2]]


def test_a_delta_lies_on_the_last_rows_of_its_prompt():
    batch = pad_left([[1, 2, 3, 8], [1, 2, 3, 4, 5, 8, 9]])
    deltas = [torch.ones(1, 2), 2 * torch.ones(3, 2)]
    delta = place(deltas, batch, layer=0, behind=[1, 2])
    assert batch.tokens[delta.rows].tolist() == [3, 3, 4, 5]
    assert delta.values[:, 0].tolist() == [1, 2, 2, 2]


def test_a_delta_is_added_behind_the_clamp(target):
    batch = pad_left([[1, 4, 71, 5]])
    rows = torch.tensor([[False, False, True, False]])
    layer = target.clamp.layer
    delta = Delta(layer, torch.full((1, 128), 7.0), rows)
    clamp = Edit(layer, torch.zeros_like)
    resid = record(target.model, batch, [layer], clamp=clamp, delta=delta)[layer]
    assert resid[0, 1:].mean(dim=1).tolist() == [0, 7, 0]
    assert resid[0, 0].abs().amax() > 0


def test_before_the_first_layer_a_token_is_its_embedding(target):
    batch = pad_left([[1, 4, 71, 5], [1, 71, 4]])
    resid = record(target.model, batch, [-1], clamp=target.clamp)[-1]
    embedded = target.model.model.embed_tokens(batch.tokens)
    assert torch.equal(resid[batch.mask], embedded[batch.mask])


def test_no_hook_stays_behind(target):
    batch = pad_left([[1, 4, 71, 5]])
    record(target.model, batch, [-1, 2, 3], clamp=target.clamp)
    layers = target.model.model.layers
    assert not any(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers)
