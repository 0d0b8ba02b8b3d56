"""What is timed, how it is kept, and the clock itself."""

import json
import math
import os
import re
import time
from collections.abc import Callable

import pytest
import timm
import torch
from helpers.latency import ARCHITECTURE, MODELS, TINY, CostModel, make
from torch import nn

import adacomcat
from adacomcat import RankPlan, find_sites
from adacomcat.convert.install import build_skeleton
from adacomcat.latency import blocks, timing
from adacomcat.latency import cache as latency_cache
from adacomcat.latency.table import Interpolation, LatencyTable, axis_knots
from adacomcat.latency.timing import Call, deployed, interleaved
from adacomcat.ops import backends
from adacomcat.sites import DENSE, Site, prunable_mlps


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch):
    """With the CPU kernels, and as if they were not built."""
    reasons = backends.available()
    if request.param == "plain":
        monkeypatch.setattr(backends, "available", lambda: reasons | {"cpp": "not built"})
    elif reasons["cpp"] is not None:
        pytest.skip(reasons["cpp"])
    return request.param


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_timed_is_what_will_run(name, path, int8) -> None:
    """Every timed block, at drawn ranks, has the types and shapes of the compressed model's."""
    model = make(name)
    hidden = prunable_mlps(model)[:1] if name == "vit" else ()
    sites = find_sites(model, hidden)
    table = LatencyTable(model, sites, 2, 8, CostModel(), int8)
    assert any(block.int8 for block in table.blocks) == int8
    assert sorted(s.name for block in table.blocks for s in block.sites) == \
        sorted(site.name for site in sites)
    for turn in range(3):
        plan = RankPlan({site.name: options[(turn + i) % len(options)]
                         for i, site in enumerate(sites) if (options := site.candidates(8))})
        whole = build_skeleton(make(name), plan)
        for parameter in whole.parameters():
            torch.nn.init.normal_(parameter)
        whole = deployed(adacomcat.quantize(whole) if int8 else whole)
        calls = blocks.captured_calls(timing.forward_pass(whole, 2), table.blocks)
        for block in table.blocks:
            built = block.built(model, [plan[site.name] for site in block.sites])
            runs = calls[block.place]
            assert parts(built) == parts(runs.module), block.place
            with torch.inference_mode():
                assert runs._replace(module=built)().shape == runs().shape


def parts(module: nn.Module) -> list[tuple[type, list[torch.Size]]]:
    return [(type(m), [t.shape for t in (*m.parameters(False), *m.buffers(False))])
            for m in module.modules()]


def test_only_the_class_token_of_the_last_block_counts_where_the_head_reads_no_other(path) -> None:
    methods = {name: [block.method for block in tables(CostModel(), model=make(name))[0].blocks
                      if block.place.endswith("attn")] for name in ("vit", "all tokens")}
    assert methods["all tokens"] == ["forward"] * 3
    assert methods["vit"][-1] == ("class_token" if path == "fused" else "forward")


def test_blocks_of_equal_shape_share_a_measurement() -> None:
    measure = CostModel()
    model = make("all tokens")
    table = LatencyTable(model, find_sites(model), 1, 8, measure)
    assert len(table.blocks) == 6 and len({id(grid) for grid in grids(table).values()}) == 2
    assert len(measure.timed) == sum(map(len, grids(table).values())) / 3 + 1


def test_between_knots_the_time_is_multilinear() -> None:
    def exact(a: float, b: float) -> float:
        return 3 + 0.5 * a + 0.25 * b + 0.01 * a * b

    grid = {f"{a},{b}": exact(a, b) for a in (8, 32, 64) for b in (16, 128)}
    grid |= {f"dense,{b}": 100.0 + b for b in (16, 128)} | {"8,dense": 7.0, "dense,dense": 9.0}
    found = Interpolation([[8, 32, 64, DENSE], [16, 128, DENSE]], grid)
    for a, b in ((8, 16), (16, 48), (40, 128), (56, 112)):
        assert found((a, b)) == pytest.approx(exact(a, b))
    assert found((DENSE, 72)) == pytest.approx(172.0)
    assert (found((8, DENSE)), found((DENSE, DENSE))) == (7.0, 9.0)


@pytest.mark.parametrize(("width", "count"), [(64, 4), (512, 4), (512, 8), (16, 3)])
def test_knots_span_the_candidates(width, count) -> None:
    site = Site("fc", "fc", "linear", width, width)
    *ranks, dense = site.candidates(8)
    knots = axis_knots(site, count, 8)
    assert knots[-1] == dense == DENSE and set(knots) <= {*ranks, DENSE}
    assert len(knots) <= count + 1 and knots[:-1] == sorted(knots[:-1])
    if ranks:
        assert (knots[0], knots[-2]) == (ranks[0], ranks[-1])


def grids(table: LatencyTable) -> dict[str, dict[str, float]]:
    return {place: found.grid for place, found in table.interpolations.items()}


def tables(*measures: CostModel, model: nn.Module | None = None, **settings) -> list[LatencyTable]:
    model = model or make()
    settings = {"batch": 1, "multiple": 8} | settings
    return [LatencyTable(model, find_sites(model), measure=m, **settings) for m in measures]


def test_the_table_outlives_the_process(cache) -> None:
    first, second = CostModel(), CostModel(factor=9.0)
    one, two = tables(first, second)
    assert second.timed == ["dense"]
    assert grids(one) == grids(two)
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_other_conditions_are_measured_apart(cache, monkeypatch) -> None:
    tables(CostModel())
    for settings in ({"batch": 2}, {"model": make().double()}, {"multiple": 16},
                     {"model": timm.create_model(ARCHITECTURE, **TINY | {"img_size": 48}).eval()}):
        measure = CostModel()
        tables(measure, **settings)
        assert len(measure.timed) > 1, settings
    for owner, name, value in ((torch, "get_num_threads", lambda: 99),
                               (adacomcat, "__version__", "99"), (torch, "__version__", "99"),
                               (latency_cache, "device_name", lambda device: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            measure = CostModel()
            tables(measure)
            assert len(measure.timed) > 1, name


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:len(text) // 2], lambda text: "[]", lambda text: "\x00",
    lambda text: json.dumps(json.loads(text) | {"machine": {}}),
    lambda text: json.dumps(json.loads(text) | {"milliseconds": 3}),
    lambda text: text.replace('": 0.', '": -0.'),
    lambda text: text.replace('": 0.', '": "0.1", "a": 0.'),
    lambda text: re.sub(r'": 0\.\d+', '": NaN', text),
    lambda text: text.replace('dense": 0', 'other": 0'),
])
def test_a_damaged_cache_is_measured_anew(damage, cache) -> None:
    tables(CostModel())
    [file] = cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(damage(file.read_text()))
    measure = CostModel()
    [table] = tables(measure)
    assert len(measure.timed) > 1
    assert all(value > 0 for grid in grids(table).values() for value in grid.values())
    assert json.loads(file.read_text()) == whole
    assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(cache) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    measures = CostModel(), CostModel()
    tables(*measures)
    assert measures[0].timed == measures[1].timed and len(measures[0].timed) > 1


def test_a_write_that_fails_leaves_the_old_cache(cache, monkeypatch) -> None:
    tables(CostModel())
    [file] = cache.iterdir()
    before = file.read_text()

    def dies(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", dies)
    tables(CostModel(), batch=2)
    assert file.read_text() == before and list(cache.iterdir()) == [file]


def test_real_times_are_finite_and_cached(cache) -> None:
    model = make()
    table = LatencyTable(model, find_sites(model), 1, 8, timing.measure)
    times = [value for grid in grids(table).values() for value in grid.values()]
    plan = RankPlan.uniform(model, 0.5)
    for value in (*times, table.dense_ms, table.plan_ms(plan)):
        assert math.isfinite(value) and value > 0
    [file] = cache.iterdir()
    kept = json.loads(file.read_text())["milliseconds"]
    assert [*kept.values()] == [*{id(grid): grid for grid in grids(table).values()}.values()]


def test_the_median_of_turns_counts_and_the_first_do_not() -> None:
    durations = {"a": [99, 99, 1, 1, 5, 1, 1], "b": [99, 99, 2, 50, 2, 3, 2]}
    now, order = [0.0], []

    def run(key: str) -> Callable[[], None]:
        left = iter(durations[key])

        def call() -> None:
            order.append(key)
            now[0] += next(left)
        return call

    found = interleaved({key: run(key) for key in durations}, 5, clock=lambda: now[0])
    assert found == {"a": 1e3, "b": 2e3}
    assert order == ["a", "b"] * 7


class Sleeper(nn.Module):
    def forward(self) -> None:
        time.sleep(0.005)


def test_on_one_thread_only_its_own_time_counts(monkeypatch) -> None:
    """Waiting is none of it, as it is not while another process holds the core."""
    for threads, least, most in ((1, 0, 4), (2, 5, math.inf)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = timing.measure({"sleep": Call(Sleeper(), "forward", (), {})})["sleep"]
        assert least <= found <= most
