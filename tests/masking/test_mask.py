"""Masks: what they count, how they compare, and that a file is the mask or a refusal in words."""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bert_tickets.errors import UserError
from bert_tickets.files import safetensors_parts
from bert_tickets.masking.mask import Mask

QUERY, BIAS = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.query.bias"
BERT_BASE = {  # the 73 matrices of BERT-base that are pruned
    **{
        f"bert.encoder.layer.{layer}.{name}.weight": shape
        for layer in range(12)
        for name, shape in {
            "attention.self.query": (768, 768),
            "attention.self.key": (768, 768),
            "attention.self.value": (768, 768),
            "attention.output.dense": (768, 768),
            "intermediate.dense": (3072, 768),
            "output.dense": (768, 3072),
        }.items()
    },
    "bert.pooler.dense.weight": (768, 768),
}


def bits(*rows: str) -> Mask:
    """Each row of 0s and 1s as one tensor: "110" keeps the first two weights."""
    return Mask({f"w{i}": torch.tensor([c == "1" for c in row]) for i, row in enumerate(rows)})


def drawn(seed: int = 0) -> Mask:
    """Two matrices, a bias and a scalar, about half of each kept."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {QUERY: (5, 7), BIAS: (5,), "bert.pooler.dense.weight": (3, 3), "gate": ()}
    return Mask({name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()})


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
names = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")


@st.composite
def masks(draw, count: int = 1) -> list[Mask]:
    """Masks over the same tensors, with a scalar among them: a mask covers one weight at least."""
    layout = draw(st.dictionaries(names, shapes, max_size=4)) | {"scalar": ()}
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shares = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=count, max_size=count))
    return [Mask({name: torch.tensor(rng.random(shape) < share) for name, shape in layout.items()}) for share in shares]


# ---- counting ----


def test_ones_keeps_every_weight():
    mask = Mask.ones({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert (mask.total, mask.kept, mask.density, mask.sparsity) == (10, 10, 1.0, 0.0)
    assert mask["a"].shape == (2, 3)
    assert mask["a"].dtype == torch.bool


def test_density_is_kept_over_covered_across_all_tensors():
    mask = bits("1000", "1")
    assert (mask.total, mask.kept) == (5, 2)
    assert mask.density == 0.4
    assert mask.sparsity == 0.6


def test_a_mask_is_boolean():
    with pytest.raises(TypeError, match=r"w0.*float32"):
        Mask({"w0": torch.ones(3)})


# ---- two masks ----


@pytest.mark.parametrize(
    ("one", "other", "overlap", "distance"),
    [
        (("1100",), ("1010",), 1 / 3, 1 / 2),
        (("1100", "1"), ("1100", "0"), 2 / 3, 1 / 5),
        (("11", "00"), ("00", "11"), 0.0, 1.0),
        (("0000",), ("0000",), 1.0, 0.0),
        (("1111",), ("0001",), 1 / 4, 3 / 4),
    ],
)
def test_overlap_and_distance_by_hand(one, other, overlap, distance):
    assert bits(*one).overlap(bits(*other)) == pytest.approx(overlap)
    assert bits(*one).distance(bits(*other)) == pytest.approx(distance)


@settings(deadline=None)
@given(masks(count=3))
def test_overlap_and_distance_are_a_similarity_and_a_metric(three):
    a, b, c = three
    assert a.distance(b) == b.distance(a)
    assert a.overlap(b) == b.overlap(a)
    assert 0 <= a.distance(b) <= 1
    assert 0 <= a.overlap(b) <= 1
    assert (a.distance(b) == 0) == (a.overlap(b) == 1) == (a == b) == (a.sha256() == b.sha256())
    assert a.distance(c) <= a.distance(b) + b.distance(c) + 1e-12


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({QUERY: torch.zeros(4, 4), BIAS: torch.zeros(5)}, f"{QUERY} is 4 x 4 in the model and 5 x 5 in the mask"),
        ({QUERY: torch.zeros(5, 5)}, f"{BIAS}, which the model does not have"),
        ({QUERY: torch.zeros(5, 5), BIAS: torch.zeros(5), "extra": torch.zeros(1)}, "the model has extra"),
        ({QUERY: torch.zeros(25), BIAS: torch.zeros(5)}, QUERY),  # as many weights, another shape
    ],
)
def test_check_fits_names_the_tensor_that_differs(other, named):
    mask = Mask.ones({QUERY: torch.zeros(5, 5), BIAS: torch.zeros(5)})
    with pytest.raises(UserError, match=named):
        mask.check_fits(other, "the model")


def test_masks_of_other_architectures_are_not_compared():
    for compare in (Mask.overlap, Mask.distance):
        with pytest.raises(UserError, match="w1"):
            compare(bits("10", "1"), bits("10"))


# ---- what is done with a mask ----


@settings(deadline=None)
@given(masks(), st.integers(0, 2**32))
def test_shuffle_keeps_each_tensors_count_and_is_fixed_by_its_generator(one, seed):
    (mask,) = one
    first, second = (mask.shuffle(torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first == second
    first.check_fits(mask, "the original")
    assert [int(t.sum()) for t in first.values()] == [int(t.sum()) for t in mask.values()]


def test_shuffle_draws_new_places_and_leaves_the_mask_alone():
    mask = Mask({"w": torch.arange(1000) < 300})
    one, other = (mask.shuffle(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert one != other
    assert mask == Mask({"w": torch.arange(1000) < 300})
    assert 0.3 < one.distance(mask) < 0.55  # independent places differ on 2 * 0.3 * 0.7


def test_apply_zeroes_what_the_mask_removes_and_touches_nothing_else():
    mask, generator = drawn(), torch.Generator().manual_seed(1)
    weights = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in mask.items()} | {"other": torch.ones(3)}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    mask.apply(weights)
    for name, tensor in mask.items():
        assert torch.equal(weights[name], torch.where(tensor, before[name], 0.0))
    assert torch.equal(weights["other"], before["other"])


def test_apply_works_on_live_parameters():
    layer = torch.nn.Linear(4, 4)
    mask = Mask({"weight": torch.eye(4) == 1})
    mask.apply(dict(layer.named_parameters()))
    assert int(layer.weight.count_nonzero()) == 4
    assert layer.weight.requires_grad


# ---- files ----


@settings(deadline=None)
@given(masks(), st.dictionaries(st.sampled_from(["method", "base_model", "seed", "level"]), st.text(max_size=10)))
def test_a_file_gives_back_the_mask_and_what_it_says_of_itself(tmp_path_factory, one, info):
    (mask,) = one
    path = tmp_path_factory.getbasetemp() / "mask.safetensors"
    path.write_bytes(mask.to_bytes(**info))
    loaded = Mask.load(path)
    assert loaded == mask
    assert loaded.info == info
    assert loaded.to_bytes() == path.read_bytes()


def test_a_file_keeps_the_order_of_the_tensors(tmp_path):
    """Pruning breaks ties by index: a resumed run must see the tensors in the order of an uninterrupted one."""
    mask = bits("1", *["10"] * 11)
    assert list(mask) != sorted(mask)
    mask.write(tmp_path / "mask.safetensors")
    assert list(Mask.load(tmp_path / "mask.safetensors")) == list(mask)


@pytest.mark.parametrize("size", [640, 640 + 2**16, int.from_bytes(b"PK", "little")])
def test_a_file_is_read_whatever_the_size_of_its_header(tmp_path, size):
    """A safetensors file begins with its header's size, whose bytes may be those that a torch.save begins with."""
    mask, path = bits("1101"), tmp_path / "mask.safetensors"
    path.write_bytes(mask.to_bytes(note="x" * (size - header_size(mask.to_bytes(note="")))))
    assert header_size(path.read_bytes()) == size
    assert Mask.load(path) == mask


def header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


WRITER = """
import sys, torch
from bert_tickets.masking.mask import Mask
names = ["bert.encoder.layer.%d.weight" % i for i in range(20)]
mask = Mask({name: torch.arange(7 * i + 1) % 3 == 0 for i, name in enumerate(names)}, {"method": "imp", "level": "3"})
sys.stdout.buffer.write(mask.to_bytes(base_model="bert-base-uncased", seed="57", task="rte"))
"""


def test_equal_masks_give_equal_bytes_in_any_process():
    written = [
        subprocess.run(
            [sys.executable, "-c", WRITER],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert written[0] == written[1]
    assert len(written[0]) > 1000


def test_a_mask_of_bert_base_takes_a_bit_a_weight(tmp_path):
    rng = np.random.default_rng(0)
    mask = Mask({name: torch.from_numpy(rng.integers(0, 2, shape, np.uint8).view(bool)) for name, shape in BERT_BASE.items()})
    assert len(mask) == 73
    assert mask.total == 85_524_480
    path = tmp_path / "mask.safetensors"
    mask.write(path)
    assert 10_690_560 <= path.stat().st_size < 11_000_000
    assert Mask.load(path) == mask


# ---- damaged and foreign files ----


def edited(**changes: str) -> bytes:
    """A sound file's tensors under changed metadata."""
    data = drawn().to_bytes()
    end = 8 + header_size(data)
    header = json.loads(data[8:end])
    tensors = {
        name: torch.frombuffer(bytearray(data[end:]), dtype=torch.uint8)[slice(*entry["data_offsets"])]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return b"".join(safetensors_parts(tensors, header["__metadata__"] | changes))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def claims(size: int) -> bytes:
    """A header of a tensor of `size` bytes, over four."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


TERABYTES = 2**50
DAMAGED = {
    "empty": lambda: b"",
    "one byte": lambda: b"\x00",
    "truncated in the header": lambda: drawn().to_bytes()[:100],
    "truncated in the data": lambda: drawn().to_bytes()[:-1],
    "bytes appended": lambda: drawn().to_bytes() + b"\0" * 8,
    "a bit of the data flipped": lambda: flipped(drawn().to_bytes(), 8 * (8 + header_size(drawn().to_bytes())) + 7),
    "random text": lambda: b"the mask was here, and now it is not\n" * 20,
    "random bytes": lambda: random.Random(0).randbytes(1000),
    "weights in float32": lambda: save({QUERY: torch.ones(4, 4)}),
    "weights in bfloat16": lambda: save({QUERY: torch.ones(4, 4, dtype=torch.bfloat16)}),
    "weights in float8": lambda: save({QUERY: torch.ones(4, 4).to(torch.float8_e4m3fn)}),
    "another format's name": lambda: edited(format="some mask 1"),
    "no digit in the format": lambda: edited(format="bert_tickets mask ²"),
    "no checksum": lambda: edited(sha256=""),
    "no shapes": lambda: edited(shapes="{}"),
    "shapes that are no JSON": lambda: edited(shapes="{"),
    "shapes that are a list": lambda: edited(shapes="[1, 2]"),
    "a shape of words": lambda: edited(shapes=json.dumps({QUERY: ["five"]})),
    "a negative shape": lambda: edited(shapes=json.dumps({QUERY: [-5, -7]})),
    "an infinite shape": lambda: edited(shapes='{"gate": [Infinity]}'),
    "shapes nested too deep": lambda: edited(shapes="[" * 100_000),
    "metadata that claims terabytes": lambda: edited(shapes=json.dumps({QUERY: [TERABYTES]})),
    "a tensor that claims terabytes": lambda: claims(TERABYTES),
    "a header that claims terabytes": lambda: TERABYTES.to_bytes(8, "little") + b"{}",
    "a released mask cut short": lambda: saved({QUERY + "_mask": torch.ones(4, 4)})[:-30],
    "a zip archive's first bytes": lambda: b"PK\x03\x04 and no archive",
    "an old pickle's first bytes": lambda: b"\x80\x02 and no pickle",
    "a torch.save of a list": lambda: saved([torch.ones(3)]),
    "a torch.save of weights": lambda: saved({QUERY: torch.ones(4, 4)}),
    "a released mask that claims terabytes": lambda: saved({QUERY + "_mask": torch.ones(1).expand(2**25, 2**25)}),
    "a released mask of sparse tensors": lambda: saved({QUERY + "_mask": torch.eye(4).to_sparse()}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_no_sound_mask_is_refused_in_a_sentence(tmp_path, what):
    path = tmp_path / "mask.file"
    path.write_bytes(DAMAGED[what]())
    with pytest.raises(UserError, match=r"mask\.file") as refusal:
        Mask.load(path)
    assert len(str(refusal.value).split()) >= 5


def test_no_flipped_bit_changes_a_mask_unnoticed(tmp_path):
    """A bit of a file flipped: refused, or (in the name of its checksum, which old files have not) the same mask."""
    mask, path = Mask({"w": torch.arange(20) % 3 == 0, "b": torch.tensor(True)}), tmp_path / "mask.safetensors"
    data, outcomes = mask.to_bytes(level="3"), Counter()
    for bit in range(0, 8 * len(data), 3):  # of every byte two or three; in three bytes each of the eight
        path.write_bytes(flipped(data, bit))
        try:
            loaded = Mask.load(path)
            assert (loaded, loaded.info["level"]) == (mask, "3"), f"bit {bit}"
            outcomes["same"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["same"]


def test_a_newer_format_asks_for_an_update(tmp_path):
    (tmp_path / "mask.safetensors").write_bytes(edited(format="bert_tickets mask 2"))
    with pytest.raises(UserError, match=r"mask format 2.*update"):
        Mask.load(tmp_path / "mask.safetensors")


@pytest.mark.parametrize("place", ["absent.safetensors", "."])
def test_a_missing_file_is_named(tmp_path, place):
    with pytest.raises(UserError, match="no mask file at"):
        Mask.load(tmp_path / place)


# ---- the released code's masks ----


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old format"])
def test_a_released_mask_reads_as_ours(tmp_path, prefix, options):
    mask = drawn()
    released = {f"{prefix}{name}_mask": tensor.float() for name, tensor in mask.items()}
    (tmp_path / "mask.pt").write_bytes(saved(released | {"bert.embeddings.weight": torch.randn(3)}, **options))
    assert Mask.load(tmp_path / "mask.pt") == mask


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan")])
def test_released_values_other_than_0_and_1_are_refused(tmp_path, value):
    (tmp_path / "mask.pt").write_bytes(saved({QUERY + "_mask": torch.tensor([0.0, 1.0, value])}))
    with pytest.raises(UserError, match=QUERY):
        Mask.load(tmp_path / "mask.pt")


class Code:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "pickled",
    [
        saved,
        lambda value: saved(value, _use_new_zipfile_serialization=False),
        lambda value: pickle.dumps(value, protocol=2),
        lambda value: pickle.dumps(value, protocol=4),
    ],
    ids=["zip", "old format", "pickle 2", "pickle 4"],
)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, pickled):
    trace = tmp_path / "the code ran"
    (tmp_path / "mask.pt").write_bytes(pickled({QUERY + "_mask": Code(trace)}))
    with pytest.raises(UserError, match=r"mask\.pt"):
        Mask.load(tmp_path / "mask.pt")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Code(trace)))
    assert trace.exists()  # it would have run
