"""Who owns what: complete, balanced, the same everywhere, and no tensor divided without need."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_efcp.distributed.plan import Size, assign, describe

sizes_of = st.lists(
    st.builds(Size, st.integers(1, 5000), st.integers(0, 2000), st.integers(1, 500), st.booleans()), min_size=1, max_size=30
)


def loads(owners, sizes, processes):
    result = [0.0] * processes
    for who, size in zip(owners, sizes, strict=True):
        for rank, rows in who.items():
            result[rank] += size.of(rows)
    return result


@settings(deadline=None)
@given(sizes_of, st.integers(1, 8))
def test_every_row_has_one_owner(sizes, processes):
    owners = assign(sizes, processes)
    for who, size in zip(owners, sizes, strict=True):
        if len(who) == 1 and None in who.values():
            continue
        assert size.divisible
        rows = [who[rank] for rank in sorted(who)]
        assert (rows[0].start, rows[-1].stop) == (0, size.rows)
        assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
    assert owners == assign(sizes, processes)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
    st.integers(2, 8),
    st.lists(st.integers(0, 100), min_size=8, max_size=8),
)
def test_divisible_tensors_balance_to_a_row(rows, processes, held):
    sizes = [Size(r, 0, 10, True) for r in rows]
    held = [float(h) for h in held[:processes]]
    total = [h + x for h, x in zip(held, loads(assign(sizes, processes, held), sizes, processes), strict=True)]
    share = (sum(held) + sum(s.total for s in sizes)) / processes
    assert max(total) <= max(1.05 * share, share + 10 * len(rows), max(held))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_of_a_bert_only_the_embedding_is_divided(processes):
    """BERT-base at rank 4, m = 32: error 2 bytes an entry, factors 512 bytes a row or column."""

    def matrix(rows, cols):
        return Size(rows, 512 * cols + 16 * cols, 512 + 2 * cols, True)

    layer = [matrix(768, 768)] * 4 + [matrix(3072, 768), matrix(768, 3072)] + [Size(1, 768 * 128, 0, False)] * 10
    sizes = [matrix(30522, 768), matrix(512, 768), *layer * 12]
    owners = assign(sizes, processes)
    assert [i for i, who in enumerate(owners) if len(who) > 1] == ([0] if processes == 8 else [])
    assert max(loads(owners, sizes, processes)) <= 1.05 * sum(s.total for s in sizes) / processes
    assert describe(["embedding"] + ["x"] * (len(sizes) - 1), owners, sizes, processes)[0].startswith("rank 0: ")


def test_a_tensor_larger_than_a_share_is_divided():
    sizes = [Size(100, 5, 10, True), Size(10, 0, 10, True)]
    owners = assign(sizes, 2)
    assert len(owners[0]) == 2
    a, b = loads(owners, sizes, 2)
    assert abs(a - b) <= 10
