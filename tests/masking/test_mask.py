"""Masks: counts, comparison, and files, which give back the mask or an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Touch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bert_tickets.errors import Damaged, UserError
from bert_tickets.files import file_sha256, read_facts, read_tensors, write_tensors
from bert_tickets.masking.mask import Mask

QUERY, BIAS = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.attention.self.query.bias"


def bits(*rows: str) -> Mask:
    """Make a mask of one tensor per row: "110" keeps the first two weights."""
    return Mask({f"w{i}": torch.tensor([c == "1" for c in row]) for i, row in enumerate(rows)})


def random_mask(seed: int = 0) -> Mask:
    """Draw a mask of two matrices, a bias and a scalar; about half of each is kept."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {QUERY: (5, 7), BIAS: (5,), "bert.pooler.dense.weight": (3, 3), "gate": ()}
    return Mask({name: torch.rand(shape, generator=generator) > 0.5 for name, shape in shapes.items()})


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda name: name != "__metadata__")


@st.composite
def masks(draw) -> Mask:
    """Draw a mask over a few tensors, one of them a scalar, so that it covers at least one weight."""
    layout = draw(st.dictionaries(names, shapes, max_size=4)) | {"scalar": ()}
    rng, density = np.random.default_rng(draw(st.integers(0, 2**32))), draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return Mask({name: torch.tensor(rng.random(shape) < density) for name, shape in layout.items()})


# ---- counts and comparison ----


def test_density_is_kept_over_covered_across_all_tensors():
    mask, ones = bits("1000", "1"), Mask.ones({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    assert (mask.total, mask.kept, mask.density, mask.sparsity) == (5, 2, 0.4, 0.6)
    assert (ones.total, ones.kept, ones["a"].shape) == (10, 10, (2, 3))
    with pytest.raises(TypeError, match=r"w0.*float32"):
        Mask({"w0": torch.ones(3)})


@pytest.mark.parametrize(
    ("one", "other", "overlap", "distance"),
    [
        (("1100",), ("1010",), 1 / 3, 1 / 2),
        (("1100", "1"), ("1100", "0"), 2 / 3, 1 / 5),
        (("0000",), ("0000",), 1.0, 0.0),
    ],
)
def test_overlap_and_distance_by_hand(one, other, overlap, distance):
    assert bits(*one).overlap(bits(*other)) == pytest.approx(overlap)
    assert bits(*one).distance(bits(*other)) == pytest.approx(distance)


@pytest.mark.parametrize(
    ("other", "message", "partly"),
    [
        ({QUERY: torch.zeros(25), BIAS: torch.zeros(5)}, f"{QUERY} is 25 in the model and 5 x 5 in the mask", False),
        ({QUERY: torch.zeros(5, 5)}, f"{BIAS}, which the model does not have", False),
        ({QUERY: torch.zeros(5, 5), BIAS: torch.zeros(5), "extra": torch.zeros(1)}, "the model has extra", True),
    ],
)
def test_check_fits_names_the_tensor_that_differs(other, message, partly):
    mask = Mask.ones({QUERY: torch.zeros(5, 5), BIAS: torch.zeros(5)})
    for compare in (mask.overlap, mask.distance):
        with pytest.raises(UserError):
            compare(Mask.ones(other))
    with pytest.raises(UserError, match=message):
        mask.check_fits(other, "the model")
    if partly:
        mask.check_fits(other, "the model", partly=True)


# ---- set operations ----


def test_set_operations_by_hand_keep_the_info_that_both_agree_on():
    one, other = (
        Mask(bits("1100", "1"), {"task": "rte", "seed": 1}),
        Mask(bits("1010", "0"), {"task": "rte", "seed": 2, "level": 1}),
    )
    assert (one & other, one | other, ~one) == (bits("1000", "0"), bits("1110", "1"), bits("0011", "0"))
    assert (one & other).info == (other | one).info == {"task": "rte"}
    assert (~one).info == one.info


def test_set_operations_need_the_same_tensors():
    for other, message in ((bits("110"), "w0 is 3 in the other mask and 4 in the mask"), (bits("1100", "1"), "has w1")):
        for operation in (Mask.__and__, Mask.__or__):
            with pytest.raises(UserError, match=message):
                operation(bits("1100"), other)


# ---- files ----


@settings(deadline=None, max_examples=20)
@given(masks(), st.dictionaries(st.sampled_from(["method", "base_model", "seed", "level"]), st.integers() | st.text(max_size=9)))
def test_a_file_gives_back_the_mask_its_info_and_the_order_of_its_tensors(tmp_path_factory, mask, info):
    """Pruning breaks ties by index: a resumed run must see the tensors in the order of an uninterrupted one."""
    path, again = (tmp_path_factory.getbasetemp() / f"{name}.safetensors" for name in ("mask", "again"))
    mask.write(path, **info)
    loaded = Mask.load(path)
    assert (loaded, loaded.info, list(loaded)) == (mask, info, list(mask))
    loaded.write(again)
    assert again.read_bytes() == path.read_bytes()


def test_equal_masks_give_equal_bytes_in_any_process(tmp_path):
    """The sha256 of a file that was written once, by another process."""
    mask = Mask({f"layer.{i}.weight": torch.arange(7 * i + 1) % 3 == 0 for i in range(20)}, {"method": "imp", "level": 3})
    mask.write(tmp_path / "mask", base_model="bert-base-uncased", seed=57, task="rte")
    assert file_sha256(tmp_path / "mask") == "4f97a9ba4c75751a0effc5c6976bc3196d4ec9dc478ec1260bcaae9302a748b3"


def test_a_mask_of_bert_base_takes_a_bit_per_weight(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "mask.safetensors"
    mask = Mask({f"w{i}": torch.from_numpy(rng.integers(0, 2, (768, 768), np.uint8).view(bool)) for i in range(145)})
    mask.write(path)
    assert mask.total == 85_524_480
    assert 10_690_560 <= path.stat().st_size < 10_710_000
    assert Mask.load(path) == mask


# ---- damaged and foreign files ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({QUERY: torch.ones(4, 4)}, "no key that ends in _mask"),
        ({QUERY + "_mask": torch.tensor([0.0, float("nan"), 0.5])}, "not a tensor of zeros and ones"),
    ],
)
def test_a_torch_file_that_is_no_mask_is_a_users_error(tmp_path, content, message):
    torch.save(content, tmp_path / "mask.pt")
    with pytest.raises(UserError, match=rf"mask\.pt.* {message}"):
        Mask.load(tmp_path / "mask.pt")


def test_a_folder_is_a_users_error_that_names_a_file(tmp_path):
    with pytest.raises(UserError, match=r"it is a folder\. Give a file, such as .*level_01/mask\.safetensors"):
        Mask.load(tmp_path)


def test_a_file_of_weights_or_of_another_format_is_a_users_error(tmp_path):
    path = tmp_path / "mask.safetensors"
    save_file({QUERY: torch.ones(4, 4)}, path)
    with pytest.raises(Damaged, match="was not written by bert_tickets"):
        Mask.load(path)
    random_mask().write(path)
    tensors, facts = read_tensors(path), read_facts(path)
    write_tensors(path, tensors, facts | {"format": "bert_tickets mask 3"})
    with pytest.raises(UserError, match="not a mask file of this version"):
        Mask.load(path)


def test_a_file_without_the_order_of_its_tensors_is_read(tmp_path):
    """The first files of this format have none."""
    mask, path = random_mask(), tmp_path / "mask.safetensors"
    mask.write(path)
    facts = read_facts(path)
    del facts["order"]
    write_tensors(path, read_tensors(path), facts)
    assert Mask.load(path) == mask


# ---- masks of the released code ----


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old format"])
def test_a_released_mask_is_read_and_its_code_is_not_run(tmp_path, options):
    mask, path, trace = random_mask(), tmp_path / "mask.pt", tmp_path / "the code ran"
    released = {f"module.{name}_mask": tensor.float() for name, tensor in mask.items()}
    torch.save(released | {"bert.embeddings.weight": torch.randn(3)}, path, **options)
    assert Mask.load(path) == mask
    torch.save({QUERY + "_mask": Touch(trace)}, path, **options)
    with pytest.raises(UserError, match=r"mask\.pt cannot be read .* without unpickling code"):
        Mask.load(path)
    assert not trace.exists()
