"""The second stream of a captured step, with streams that only note what is asked of them."""

import contextlib
import weakref

import pytest
import torch
import torch.nn.functional as F

from bert_tickets.kernels import branch
from bert_tickets.kernels.branch import Branch, joined, linear


class Stream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"event after {len(self.notes)} notes"

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


@pytest.fixture
def notes(monkeypatch):
    """What two streams are asked for, while the first is captured."""
    found = []
    main, side = Stream("main", found), Stream("side", found)

    @contextlib.contextmanager
    def stream(current):
        assert current is side
        found.append("on side")
        yield
        found.append("on main")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(branch, "_stream", lambda device: side)
    return found


GPU = torch.device("cuda", 0)
RUN = ["side waits for main", "on side", "on main"]


def test_work_beside_a_capture_follows_its_inputs_and_keeps_them_until_the_join(notes):
    side, x = Branch(GPU), torch.ones(3)
    alive = weakref.ref(x)
    assert side.run(torch.sum, x) == 3
    assert notes == RUN
    event = side.event()
    side.wait(event)
    assert notes[3:] == ["main waits for event after 3 notes"]
    del x
    assert alive() is not None
    side.join()
    assert notes[4:] == ["main waits for side"]
    assert alive() is None


def test_gradients_of_weights_are_computed_beside_and_joined_before_anything_reads_them(notes):
    """The join comes after the whole chain of gradients, and gradients equal torch's bit for bit."""
    x, *weights = (torch.randn(5, 4, requires_grad=True) for _ in range(3))
    side = Branch(GPU)
    first, second = joined(side, [w * 1 for w in weights])
    for w, name in zip(weights, ("first", "second"), strict=True):
        w.register_hook(lambda grad, name=name: notes.append(f"gradient of {name}"))
    hidden = linear(x[:, :4], first, torch.ones(5), side)
    hidden.register_hook(lambda grad: notes.append("chain"))
    out = linear(hidden[:, :4], second, None, side)
    out.square().sum().backward()
    joins = notes.index("main waits for side")
    assert notes[:joins] == [*RUN, "chain", *RUN]
    assert {*notes[joins + 1 :]} == {"gradient of first", "gradient of second"}
    found = [t.grad.clone() for t in (x, *weights)]
    for t in (x, *weights):
        t.grad = None
    hidden = F.linear(x[:, :4], weights[0], torch.ones(5))
    F.linear(hidden[:, :4], weights[1]).square().sum().backward()
    assert all(torch.equal(mine, t.grad) for mine, t in zip(found, (x, *weights), strict=True))


def test_a_frozen_weight_takes_no_work(notes):
    x = torch.randn(3, 4, requires_grad=True)
    linear(x, torch.ones(2, 4), None, Branch(GPU)).sum().backward()
    assert notes == []
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_without_a_capture_the_branch_is_the_current_stream():
    side, x, weight = Branch(torch.device("cpu")), torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    (same,) = joined(side, [weight])
    assert same is weight
    assert torch.equal(linear(x, same, None, side), F.linear(x, weight))
    assert side.run(torch.sum, torch.ones(3)) == 3
    side.wait(side.event())
    side.join()
