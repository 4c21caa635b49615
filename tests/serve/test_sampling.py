"""Draws follow the distribution, a seed repeats them, and nobody else's randomness is touched."""

import pytest
import torch

from hovle_serve.sampling import Draw, Sampling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be"),
        ({"temperature": -0.1}, "temperature -0.1 must be"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"temperature": float("inf")}, "temperature inf must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be"),
        ({"top_p": 1.5}, "top_p 1.5 must be"),
        ({"seed": -1}, "seed -1 must be"),
    ],
)
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_zero_and_tiny_temperatures_are_greedy():
    for temperature in (0.0, 1e-9):
        sampling = Sampling(temperature=temperature)
        assert sampling.logits_processors(sampling.generator()) == ()


def sample(logits: torch.Tensor, count: int, **options) -> torch.Tensor:
    """Tokens drawn from one distribution, through the processors that generate would call."""
    sampling = Sampling(**options)
    scores = logits.expand(count, -1)
    for processor in sampling.logits_processors(sampling.generator()):
        scores = processor(None, scores)
    return scores.argmax(-1)


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = sample(logits, 20_000, temperature=1.0, seed=1).bincount(minlength=4) / 20_000
    assert drawn == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    sharp = sample(logits, 20_000, temperature=0.5, seed=1).bincount(minlength=4) / 20_000
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert sharp == pytest.approx((squares / squares.sum()).tolist(), abs=0.015)
    nucleus = sample(logits, 20_000, temperature=1.0, top_p=0.7, seed=1).bincount(minlength=4) / 20_000
    assert nucleus == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)


def test_suppressed_tokens_are_never_drawn():
    logits = torch.tensor([float("-inf"), 0.0, float("-inf")])
    assert set(sample(logits, 500, temperature=5.0).tolist()) == {1}


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    logits = torch.zeros(1000)
    state = torch.get_rng_state()
    assert torch.equal(sample(logits, 8, temperature=1.0, seed=5), sample(logits, 8, temperature=1.0, seed=5))
    assert not torch.equal(sample(logits, 8, temperature=1.0), sample(logits, 8, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_low_precision_scores_keep_their_dtype():
    scores = Draw(torch.Generator().manual_seed(0))(
        torch.zeros(2, 1), torch.zeros(2, 5, dtype=torch.bfloat16)
    )
    assert scores.dtype == torch.bfloat16
    assert (scores == 0).sum(-1).tolist() == [1, 1]
