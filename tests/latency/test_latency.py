"""Milliseconds as the budget. Where a number is judged, a model of cost stands for the clock."""

import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import pytest
import timm
import torch
from helpers.plans import choose_plan_for_latency
from torch import nn

import adacomcat
from adacomcat import RankPlan, UserError, cli, find_sites
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.refine import refined_allocation
from adacomcat.allocation.sensitivity import error_weights, relative_sensitivities, weighted_error
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import build_skeleton
from adacomcat.latency import blocks, timing
from adacomcat.latency import cache as latency_cache
from adacomcat.latency.table import Interpolation, LatencyTable, axis_knots
from adacomcat.latency.timing import Call, deployed, interleaved
from adacomcat.ops import backends
from adacomcat.sites import DENSE, Site, prunable_mlps

ARCHITECTURE = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}
MODELS = {  # with and without blocks that fuse; tiers A, B and C
    "vit": (ARCHITECTURE, TINY),
    "all tokens": (ARCHITECTURE, TINY | {"global_pool": "", "num_classes": 0}),
    "normed queries": (ARCHITECTURE, TINY | {"qk_norm": True}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": (2, 2),
                                             "num_heads": (2, 4), "num_classes": 5}),
    "rotary": ("vit_small_patch16_dinov3", {"img_size": 32, "embed_dim": 64, "depth": 2,
                                           "num_heads": 2}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "adacomcat/latency"


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch):
    """With the CPU kernels, and as if they were not built."""
    reasons = backends.available()
    if request.param == "plain":
        monkeypatch.setattr(backends, "available", lambda: reasons | {"cpp": "not built"})
    elif reasons["cpp"] is not None:
        pytest.skip(reasons["cpp"])
    return request.param


def make(name: str = "vit") -> nn.Module:
    architecture, settings = MODELS[name]
    return timm.create_model(architecture, **settings).eval()


class CostModel:
    """0.02 ms a call and 1 ms for 10⁵ weights; of whole models ``factor`` times that."""

    def __init__(self, factor: float = 1.3, weigh: Callable[[str], float] = lambda name: 1.0):
        self.factor, self.weigh = factor, weigh
        self.timed: list[str] = []

    def __call__(self, calls: Mapping[str, Call]) -> dict[str, float]:
        self.timed += calls
        return {key: self.milliseconds(call) for key, call in calls.items()}

    def milliseconds(self, call: Call) -> float:
        weights = sum(self.weigh(name) * parameter.numel()
                      for name, parameter in call.module.named_parameters())
        return 0.02 + (self.factor if call.method == "__call__" else 1.0) * weights / 1e5

    def of(self, model: nn.Module) -> float:
        return self.milliseconds(Call(deployed(model), "__call__", (), {}))


def chosen(model: nn.Module, measure: CostModel, milliseconds: float, **settings) -> RankPlan:
    return choose_plan_for_latency(model, factorize_model(model), find_sites(model), milliseconds,
                                   measure, **settings)


def latency_of(plan: RankPlan, measure: CostModel) -> float:
    return measure.of(build_skeleton(make(), plan))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_the_model_lands_within_3_percent_below_the_budget(factor, share) -> None:
    """However wrong the sum of the parts is."""
    model, measure = make(), CostModel(factor)
    budget = share * measure.of(model)
    plan = chosen(model, measure, budget, multiple=1)
    assert 0.97 * budget <= latency_of(plan, measure) <= budget


def test_every_plan_that_a_refinement_tries_stays_below_the_budget() -> None:
    model, measure, tried = make(), CostModel(1.5), []
    budget, sites, factors = 0.7 * measure.of(model), find_sites(model), factorize_model(model)
    allocator = LatencyAllocator(model, factors, sites, max_latency_ms=budget, multiple=2,
                                 measure=measure)

    def loss(plan: RankPlan) -> float:
        tried.append(latency_of(plan, measure))
        return tried[-1]

    weights = relative_sensitivities(sites, factors)
    found = refined_allocation(allocator.plan, weights, sites, loss, 6)
    assert found.tried == 6 == len(tried) - 1 and max(tried) <= budget


@pytest.mark.parametrize("share", [0.75, 0.8, 0.9, 0.95])
def test_coarse_ranks_stay_below_the_budget(share) -> None:
    model, measure = make(), CostModel(1.5)
    budget = share * measure.of(model)
    assert latency_of(chosen(model, measure, budget, multiple=16), measure) <= budget


def test_a_budget_beyond_the_dense_model_keeps_it_dense() -> None:
    model, measure = make(), CostModel()
    plan = chosen(model, measure, 1.1 * measure.of(model))
    assert set(plan.ranks.values()) == {DENSE}


def test_the_least_that_the_error_names_is_reachable() -> None:
    model, measure = make(), CostModel()
    with pytest.raises(UserError, match="is below what is reachable here; the least is") as caught:
        chosen(model, measure, 0.01)
    least = float(str(caught.value).partition("the least is ")[2].split()[0]) + 0.01
    assert latency_of(chosen(model, measure, least), measure) <= least


def in_attention(name: str) -> bool:
    """By the names of weights in fused and plain modules, in timed blocks and whole models."""
    return re.search(r"(^|\.)(w[qkvo]|qkv\.weight|proj\.weight)$", name) \
        is not None and "patch" not in name


def in_mlp(name: str) -> bool:
    return re.search(r"(^|\.)(w[12]|[uv][12]|fc[12]\.\w+)$", name) is not None


def test_what_costs_more_time_loses_more_rank(tmp_path, monkeypatch) -> None:
    model = make()

    def left(slow: Callable[[str], bool]) -> tuple[int, int]:
        """Weights of attentions and of MLPs, where one kind takes ten times as long."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / slow.__name__))
        measure = CostModel(weigh=lambda name: 10.0 if slow(name) else 1.0)
        plan = chosen(model, measure, 0.6 * measure.of(model))
        sites = find_sites(model)
        return tuple(sum(site.params(plan[site.name]) for site in sites if kind in site.name)
                     for kind in ("attn", "mlp"))

    (slow_attention, mlps), (attention, slow_mlps) = left(in_attention), left(in_mlp)
    assert slow_attention < attention and slow_mlps < mlps


def test_plans_have_less_error_than_rivals_of_equal_latency() -> None:
    """Than plans with equal ranks in every block, up to one step of one block that did not fit, and
    on average a tenth less."""
    model, measure = make(), CostModel(1.0)
    sites, factors = find_sites(model), factorize_model(model)
    weights = error_weights(model, factors, None, sites)

    def error(plan: RankPlan) -> float:
        return sum(weighted_error(factors, weights, site, plan[site.name]) for site in sites)

    kinds = [site.name.rpartition(".")[2] for site in sites]
    grid = itertools.product((8, 16, DENSE), (8, 16, DENSE), (16, 32, DENSE), (16, 32, DENSE))
    rivals = [RankPlan({site.name: dict(zip(("qk", "vo", "fc1", "fc2"), ranks, strict=True))[kind]
                        for site, kind in zip(sites, kinds, strict=True) if kind != "head"})
              for ranks in list(grid)[1::5]]
    plans = [chosen(model, measure, latency_of(rival, measure) / 0.985) for rival in rivals]
    pairs = [(error(plan), error(rival)) for plan, rival in zip(plans, rivals, strict=True)]
    largest_step = max(weighted_error(factors, weights, site, site.candidates(8)[0])
                       for site in sites)
    assert all(ours <= theirs + largest_step for ours, theirs in pairs)
    assert statistics.fmean(ours / theirs for ours, theirs in pairs) < 0.9


@pytest.mark.parametrize("name", MODELS)
def test_what_is_timed_is_what_will_run(name, path) -> None:
    """Every timed block, at drawn ranks, has the types and shapes of the compressed model's."""
    model = make(name)
    hidden = prunable_mlps(model)[:1] if name == "vit" else ()
    sites = find_sites(model, hidden)
    table = LatencyTable(model, sites, 2, 8, CostModel())
    assert sorted(s.name for block in table.blocks for s in block.sites) == \
        sorted(site.name for site in sites)
    for turn in range(3):
        plan = RankPlan({site.name: options[(turn + i) % len(options)]
                         for i, site in enumerate(sites) if (options := site.candidates(8))})
        whole = deployed(build_skeleton(make(name), plan))
        calls = blocks.captured_calls(timing.forward_pass(whole, 2), table.blocks)
        for block in table.blocks:
            built = block.built(model, [plan[site.name] for site in block.sites])
            runs = calls[block.place]
            assert [(type(m), [p.shape for p in m.parameters(False)]) for m in built.modules()] \
                == [(type(m), [p.shape for p in m.parameters(False)])
                    for m in runs.module.modules()], block.place
            with torch.inference_mode():
                assert runs._replace(module=built)().shape == runs().shape


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
                               (latency_cache, "_cpu_name", lambda: "another")):
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

    monkeypatch.setattr(latency_cache.os, "replace", dies)
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


@pytest.fixture
def clockless(monkeypatch) -> CostModel:
    measure = CostModel()
    monkeypatch.setattr(timing, "interleaved", lambda runs, *_: measure(runs))
    return measure


def test_compress_takes_milliseconds_and_only_one_budget(clockless) -> None:
    model = make()
    budget = 0.6 * clockless.of(model)
    for images in (None, torch.randn(16, 3, 32, 32)):
        small = adacomcat.compress(model, max_latency_ms=budget, calibration=images)
        assert 0.9 * budget < clockless.of(small) <= budget
        pruned = [name for name in small.rank_plan.ranks if name.endswith("hidden")]
        assert len(pruned) == (0 if images is None else 3)
    for budgets in ({}, {"max_latency_ms": 1.0, "keep_params": 0.5},
                    {"max_latency_ms": 1.0, "plan": RankPlan()}):
        with pytest.raises(UserError, match="exactly one of keep_params, keep_macs, max_latency"):
            adacomcat.compress(model, **budgets)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="max_latency_ms must be above 0"):
            adacomcat.compress(model, max_latency_ms=value)


def command(*flags: object) -> list[str]:
    settings = [f"{key}={value}" for key, value in TINY.items()
                if key not in ("img_size", "num_classes")]
    return [str(word) for word in ("compress", "-m", ARCHITECTURE, "--img-size", 32,
                                   "--num-classes", 5, "--model-kwargs", *settings, *flags)]


def test_command_line(clockless, tmp_path, capsys) -> None:
    budget = 0.6 * clockless.of(make())
    assert cli.main(command("--max-latency-ms", budget, "--output", tmp_path / "small",
                            "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    small = adacomcat.load(tmp_path / "small")
    assert rows["compressed"]["latency_ms"] == pytest.approx(clockless.of(small))
    assert rows["compressed"]["latency_ms"] <= budget < rows["dense"]["latency_ms"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--max-latency-ms", "0.1"], "0.1 ms is below what is reachable here; the least is"),
    (["--max-latency-ms", "0"], "must be a number above 0; got '0'"),
    (["--max-latency-ms", "fast"], "must be a number above 0; got 'fast'"),
    (["--max-latency-ms", "9", "--keep-params", "0.5"], "exclude each other"),
    (["--max-latency-ms", "9", "--latency-batch", "0"], "at least 1"),
    ([], "needs one of --keep-params, --keep-macs, --max-latency-ms and --plan"),
])
def test_bad_budgets_are_one_line(flags: Iterable[str], says, clockless, tmp_path, capsys) -> None:
    assert cli.main(command(*flags, "--output", tmp_path / "small")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "adacomcat: error" in line]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "small").exists()
