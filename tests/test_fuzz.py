"""Disout on whatever shape, dtype, memory format, block, rate and reader hypothesis comes up with."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disout import Disout

# The form is set once for all examples, as it should be.
SET_ONCE_FOR_ALL = [HealthCheck.function_scoped_fixture]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "a part": lambda x: torch.cat([x, x + 1])[: len(x)],
}


@st.composite
def cases(draw):
    """A layer, its input, and the weight that reads it or None."""
    sides = st.integers(1, 9)
    maps = [st.tuples(st.integers(0, 4), st.integers(0, 6), *[sides] * count) for count in (1, 2, 3)]
    shape = draw(st.one_of(*maps, st.tuples(sides, sides)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale, offset = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0])), draw(st.sampled_from([0.0, 30.0]))
    x = torch.randn(shape, generator=generator) * scale + offset
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x.to(dtype))
    rate = draw(st.one_of(st.sampled_from([0.0, 1e-6, 0.09, 1.0]), st.floats(0, 1)))
    layer = Disout(rate, draw(st.integers(1, 11)), draw(st.sampled_from([0.0, 1.0, 20.0])), draw(st.booleans()))
    channels, side = shape[1], draw(st.sampled_from([1, 3]))
    weight = torch.randn(5, channels, *[side] * (len(shape) - 2), generator=generator).to(dtype)
    if len(shape) > 2 and channels and draw(st.booleans()):  # depthwise
        weight = torch.randn(2 * channels, 1, *[side] * (len(shape) - 2), generator=generator)
    if draw(st.booleans()):
        layer.features_last, x = True, x.movedim(1, -1)
    return layer, x, draw(st.sampled_from([weight, None])) if channels else None


@pytest.mark.usefixtures("form")
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cases())
def test_whatever_comes_in(case):
    layer, x, weight = case
    assert layer.eval()(x, weight) is x
    x.requires_grad_()
    torch.manual_seed(0)
    y = layer.train()(x, weight)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.isfinite().all()
    if x.numel():
        y.backward(torch.ones_like(y))
        kept = x.grad != 0
        share = kept.sum(dtype=torch.int32) / x.numel()
        assert torch.equal(y[kept], (x / share)[kept])
        torch.testing.assert_close(layer.distorted, 1 - share)
        torch.testing.assert_close(x.grad[kept], (torch.ones_like(x) / share)[kept])
        if layer.dist_prob == 0:
            assert torch.equal(y, x)
