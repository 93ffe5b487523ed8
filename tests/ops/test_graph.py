from __future__ import annotations

import pytest
import torch

from ulfine_fast.ops import graph
from ulfine_fast.ops.graph import Neighbors, nearest, normalized, propagate, spread, symmetric
from ulfine_fast.ops.prototypes import normalize

T, M, D = 3, 9, 4


def rows(seed=0, count=M):
    torch.manual_seed(seed)
    return normalize(torch.randn(T, count, D))


def all_present(count=M):
    return torch.ones(T, count, dtype=torch.bool)


def dense(matrix, nodes):
    """The blocks (T, n, n) of a block-diagonal sparse matrix."""
    whole = matrix.to_dense().view(T, nodes, T, nodes)
    return torch.stack([whole[t, :, t] for t in range(T)])


@pytest.mark.parametrize("skip_self", [False, True])
def test_nearest_is_what_sorting_all_cosines_gives(skip_self):
    keys = rows()
    queries = keys if skip_self else rows(seed=1, count=7)
    result = nearest(queries, keys, all_present(), 3, skip_self=skip_self)
    for t in range(T):
        for i, query in enumerate(queries[t]):
            others = [j for j in range(M) if not (skip_self and i == j)]
            cosines = {j: float(query @ keys[t, j]) for j in others}
            wanted = sorted(cosines, key=cosines.get, reverse=True)[:3]
            assert result.indices[t, i].tolist() == wanted
            assert result.weight[t, i].tolist() == pytest.approx([max(0.0, cosines[j]) for j in wanted], abs=1e-6)


def test_padding_is_no_ones_neighbour():
    keys, present = rows(), all_present()
    present[0, 2:] = False
    result = nearest(keys, keys, present, 4)
    assert (result.weight[0, :, 2:] == 0).all()
    # the two that are there keep their weights, and other trials do not notice
    assert result.weight[0, 0, 0] == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(result.weight[1:], nearest(keys, keys, all_present(), 4).weight[1:])


def test_a_image_alone_has_no_neighbour():
    keys, present = rows(), all_present()
    present[0, 1:] = False
    assert (nearest(keys, keys, present, 3, skip_self=True).weight[0, 0] == 0).all()


def test_fewer_keys_than_neighbours():
    result = nearest(rows(), rows(count=2), all_present(2), 5)
    assert result.indices.shape == (T, M, 2)


@pytest.mark.parametrize("skip_self", [False, True])
def test_blocks_of_rows_give_what_one_block_gives(monkeypatch, skip_self):
    keys = rows()
    whole = nearest(keys, keys, all_present(), 3, skip_self=skip_self)
    monkeypatch.setattr(graph, "_CELLS", 2 * T * M)
    parts = nearest(keys, keys, all_present(), 3, skip_self=skip_self)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.weight, parts.weight)


def slow_graph(links, nodes):
    matrix = torch.zeros(T, nodes, nodes)
    for t in range(T):
        for i in range(links.indices.shape[1]):
            for j, weight in zip(links.indices[t, i].tolist(), links.weight[t, i].tolist(), strict=True):
                matrix[t, i, j] += weight
                matrix[t, j, i] += weight
    return matrix


@pytest.mark.parametrize("nodes", [M, M + 2])
def test_the_graph_adds_both_directions_up_and_keeps_trials_apart(nodes):
    links = nearest(rows(), rows(), all_present(), 3, skip_self=True)
    built = symmetric(links, nodes)
    torch.testing.assert_close(dense(built, nodes), slow_graph(links, nodes))
    assert built.to_dense().sum() == pytest.approx(float(dense(built, nodes).sum()), rel=1e-5)


def test_spread_is_the_matrix_product():
    built = symmetric(nearest(rows(), rows(), all_present(), 3, skip_self=True), M)
    values = torch.randn(T, M, 2)
    torch.testing.assert_close(spread(built, values), dense(built, M) @ values)


def test_normalisation_divides_by_both_ends_degrees():
    links = nearest(rows(), rows(), all_present(), 3, skip_self=True)
    raw = slow_graph(links, M)
    degree = raw.sum(-1)
    wanted = raw / (degree.unsqueeze(-1) * degree.unsqueeze(-2)).sqrt()
    result = dense(normalized(symmetric(links, M)), M)
    torch.testing.assert_close(result, wanted)
    assert torch.linalg.eigvalsh(result).abs().max() <= 1 + 1e-5


def test_a_node_without_edges_keeps_its_source_and_gives_nothing():
    lonely = Neighbors(torch.tensor([[[1], [0]]]).expand(T, -1, -1), torch.ones(T, 2, 1))
    matrix = normalized(symmetric(lonely, 3))
    sources = torch.eye(3).expand(T, -1, -1)
    result = propagate(matrix, sources, torch.full((T,), 0.5))
    # two linked nodes: 1 / (1 - a^2) at home, a / (1 - a^2) next door
    wanted = torch.tensor([[4 / 3, 2 / 3, 0.0], [2 / 3, 4 / 3, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(result, wanted.expand(T, -1, -1))


def test_propagation_solves_the_linear_system_at_each_trials_alpha():
    matrix = normalized(symmetric(nearest(rows(), rows(), all_present(), 3, skip_self=True), M))
    sources, alpha = torch.rand(T, M, 2), torch.tensor([0.0, 0.3, 0.9])
    system = torch.eye(M) - alpha.view(-1, 1, 1) * dense(matrix, M)
    torch.testing.assert_close(
        propagate(matrix, sources, alpha), torch.linalg.solve(system, sources), rtol=1e-4, atol=1e-5
    )


def test_propagation_of_nothing_is_nothing():
    matrix = normalized(symmetric(nearest(rows(), rows(), all_present(), 3), M))
    assert (propagate(matrix, torch.zeros(T, M, 2), torch.full((T,), 0.9)) == 0).all()


def test_labels_fade_along_a_chain():
    index = torch.tensor([[[1], [2], [3], [2]]]).expand(T, -1, -1)
    matrix = normalized(symmetric(Neighbors(index, torch.ones(T, 4, 1)), 4))
    sources = torch.zeros(T, 4, 1)
    sources[:, 0] = 1
    result = propagate(matrix, sources, torch.full((T,), 0.5))[0, :, 0]
    assert (result > 0).all()
    assert result.tolist() == sorted(result.tolist(), reverse=True)
