"""Log-sum-exp states: merging is exact, in any order, and never makes a NaN."""

from __future__ import annotations

import torch

from xdist.comm.scan import scan
from xdist.comm.scan_maps import Maps, merge_exponents
from xdist.layout import Layout


def test_empty_states_merge_to_an_empty_one() -> None:
    empty = Maps("logsumexp").empty(torch.empty(2, 1, 5))
    both = merge_exponents(empty, empty)
    assert torch.equal(both, empty)
    some = torch.tensor([3.0, 1.0, 2.0, -1.0, 0.5]).expand(2, 1, 5)
    assert torch.equal(merge_exponents(empty, some), some)
    assert torch.equal(merge_exponents(some, empty), some)


def test_exponents_far_apart() -> None:
    low, high = torch.tensor([-3e38, 1.0, 2.0]), torch.tensor([3e38, 1.0, 5.0])
    for one, two in ((low, high), (high, low)):
        assert torch.equal(merge_exponents(one, two), high)
    near = merge_exponents(torch.tensor([1000.0, 1.0, 2.0]), torch.tensor([999.0, 1.0, 5.0]))
    e = torch.tensor(-1.0).exp()
    torch.testing.assert_close(near, torch.stack((torch.tensor(1000.0), 1 + e, 2 + 5 * e)))


def test_no_nan_where_a_document_has_no_score() -> None:
    """Segments without any score: states and gradients stay finite but for the exponents."""
    states = Maps("logsumexp").empty(torch.empty(4, 1, 1, 4)).requires_grad_()
    found = scan(
        states,
        None,
        Layout.from_segments(4, [[(0, 1), (1, 2), (2, 3), (3, 4)]]),
        None,
        transition="logsumexp",
    )
    assert not found.isnan().any()
    found[..., 1:].sum().backward()
    assert states.grad is not None
    assert states.grad[..., 1:].isfinite().all()
    assert not states.grad.isnan().any()
