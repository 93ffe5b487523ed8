from __future__ import annotations

import torch

from ulfine_fast.engine.memory import budget, free_memory, peak_bytes

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_alive_together():
    def work():
        first = torch.zeros(1000)
        second = first + 1
        del first, second
        torch.zeros(1500)

    assert peak_bytes(work, CPU) == 8000


def test_views_and_results_in_place_count_once():
    assert peak_bytes(lambda: torch.zeros(10, 10).view(-1)[5:].add_(1), CPU) == 400


def test_the_graph_of_a_gradient_counts_until_it_is_let_go():
    weight = torch.ones(1000, requires_grad=True)

    def work():
        (weight.exp() * weight.sin()).sum().backward()

    # exp and sin are kept for the product's gradient; backward adds at least one more
    assert 12000 <= peak_bytes(work, CPU) <= 12000 + 7 * 4000


def test_free_memory_is_what_the_system_says(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   2000 kB\n")
    assert free_memory(tmp_path) == 2000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 2000 * 1024
    (group / "memory.max").write_text("51000\n")
    assert free_memory(tmp_path) == 50000


def test_there_is_memory_here_and_the_budget_is_a_part_of_it(tmp_path):
    assert free_memory(tmp_path / "nothing") > 0
    assert 0 < budget(CPU) <= 8 << 30
