"""The bank of anchors: first in, first out, and in checkpoints."""

import pytest
import torch

from mvmr_loss.distillation import AnchorBank


def samples(start, count):
    numbers = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return numbers.expand(-1, 2), {"a": numbers.expand(-1, 3)}


def test_the_last_samples_stay_and_pairs_stay_together():
    bank = AnchorBank(5, 2, {"a": 3})
    assert bank.samples()[0].shape == (0, 2)
    seen = 0
    for count in (2, 2, 3, 12, 1):
        bank.update(*samples(seen, count))
        seen += count
        embeddings, teachers = bank.samples()
        last = list(range(max(0, seen - 5), seen))
        # Those that are there, in turn where fewer than 5 came.
        assert sorted(embeddings[:, 0].tolist()) == sorted((last * 5)[:5])
        assert torch.equal(embeddings[:, 0], teachers["a"][:, 2])


def test_writes_in_place_and_keeps_no_graph():
    bank = AnchorBank(4, 2, {"a": 3})
    held = bank.embeddings.data_ptr()
    leaf = torch.ones(3, 2, requires_grad=True)
    bank.update(leaf, {"a": torch.ones(3, 3)})
    assert bank.embeddings.data_ptr() == held
    assert not bank.samples()[0].requires_grad


@pytest.mark.parametrize("earlier", [0, 2, 7])
def test_a_checkpoint_goes_on_where_it_was(earlier):
    bank = AnchorBank(5, 2, {"a": 3})
    if earlier:
        bank.update(*samples(0, earlier))
    restored = AnchorBank(5, 2, {"a": 3})
    restored.load_state_dict(bank.state_dict())
    for module in (bank, restored):
        module.update(*samples(earlier, 2))
        assert torch.equal(
            module.samples()[0][:, 0].unique(), module.samples()[1]["a"][:, 0].unique()
        )
    assert torch.equal(restored.samples()[0], bank.samples()[0])
    assert len(restored.samples()[0]) == 5


@pytest.mark.parametrize(
    ("embeddings", "teachers", "match"),
    [
        (torch.ones(2, 2), {}, "teachers must be a but are"),
        (torch.ones(2, 2), {"a": torch.ones(3, 3)}, "must have shape"),
        (torch.ones(2, 3), {"a": torch.ones(2, 3)}, "embeddings must have shape"),
        (torch.full((2, 2), torch.nan), {"a": torch.ones(2, 3)}, "embeddings must be finite"),
    ],
)
def test_errors(embeddings, teachers, match):
    bank = AnchorBank(4, 2, {"a": 3})
    with pytest.raises(ValueError, match=match):
        bank.update(embeddings, teachers)
    assert len(bank.samples()[0]) == 0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="size must be at least 1"):
        AnchorBank(0, 2, {"a": 3})
    with pytest.raises(TypeError, match="must be an int"):
        AnchorBank(4, 2, {"a": 3.5})


def test_widths_are_by_name():
    with pytest.raises(TypeError, match="teacher_dims must be a mapping .* but is a list"):
        AnchorBank(4, 2, ["a"])
    with pytest.raises(ValueError, match=r"without '\.'.* but has 'a\.b'"):
        AnchorBank(4, 2, {"a.b": 3})


@pytest.mark.parametrize("where", ["embeddings", "teacher"])
def test_a_sample_that_is_not_finite_is_left_out_where_nobody_looks(monkeypatch, where):
    monkeypatch.setattr("mvmr_loss.distillation.bank.check_finite", lambda *_: None)
    bank = AnchorBank(4, 2, {"a": 3})
    bank.update(*samples(1, 4))
    embeddings, teachers = (samples(5, 2)[0].clone(), {"a": samples(5, 2)[1]["a"].clone()})
    (embeddings if where == "embeddings" else teachers["a"])[1, 0] = torch.nan
    bank.update(embeddings, teachers)
    kept, kept_teachers = bank.samples()
    assert kept[:, 0].tolist() == kept_teachers["a"][:, 0].tolist() == [5, 2, 3, 4]


def test_its_state_is_tensors_which_an_average_of_weights_can_copy():
    bank = AnchorBank(4, 2, {"a": 3})
    bank.update(*samples(0, 3))
    state = bank.state_dict()
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert state["written"] == 3
