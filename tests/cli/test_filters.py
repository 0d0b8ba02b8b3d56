"""What is compressed, chosen on the command line, and plans whose names are globs."""

import json
import re

import pytest
from helpers.command_line import MODEL
from helpers.models import dense_model

import adacomcat
from adacomcat import RankPlan, UserError, compress
from adacomcat.cli.main import parse


def sites(data) -> set[str]:
    return {row["site"] for row in data["sites"]}


def test_filters_choose_sites(run_json):
    every = sites(run_json("inspect", *MODEL))
    assert sites(run_json("inspect", *MODEL, "--include", "blocks.0.*")) == {
        name for name in every if name.startswith("blocks.0.")}
    assert sites(run_json("inspect", *MODEL, "--exclude", "*.mlp", "re:^head")) == {
        name for name in every if ".mlp." not in name and name != "head"}


def test_filters_bound_compression(run_json, tmp_path):
    made = run_json("compress", *MODEL, "--keep-params", "0.9", "--include", r"re:\.mlp\.",
                    "--exclude", "blocks.0", "-o", tmp_path / "small")
    low = {name for name, rank in made["ranks"].items() if rank != "dense"}
    assert low and all(".mlp." in name and not name.startswith("blocks.0.") for name in low)


def test_filters_from_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("include: ['blocks.*.mlp', 're:attn']\nkeep_params: 0.5\n")
    args = parse(["compress", "-c", str(tmp_path / "c.yaml"), "-m", "x", "-o", "y"])
    assert args.include == ["blocks.*.mlp", re.compile("attn")]


def test_wrong_filters(run):
    code, _, err = run("inspect", *MODEL, "--include", "re:(")
    assert code == 2 and "must be a glob, or re: and a regular expression; '(' is none" in err
    code, _, err = run("inspect", *MODEL, "--exclude", "block.0")
    assert code == 2 and "no projection of this model is called 'block.0'" in err


def test_globs_in_plans():
    model = dense_model()
    plan = RankPlan({"blocks.*.attn.*": 8, "blocks.1.*": "dense", "blocks.1.attn.vo": 4,
                     "blocks.0.mlp.fc?": 16})
    assert plan.resolved(model).ranks == {
        "blocks.0.attn.qk": 8, "blocks.0.attn.vo": 8, "blocks.1.attn.qk": "dense",
        "blocks.1.attn.vo": 4, "blocks.1.mlp.fc1": "dense", "blocks.1.mlp.fc2": "dense",
        "blocks.0.mlp.fc1": 16, "blocks.0.mlp.fc2": 16}
    small = compress(model, plan=plan)
    assert small.rank_plan == plan.resolved(model)
    assert (small.blocks[0].attn.rank_qk, small.blocks[1].attn.rank_vo) == (8, 4)
    assert RankPlan(small.rank_plan.ranks).resolved(model) == small.rank_plan


def test_globs_over_neurons():
    model = dense_model()
    found = RankPlan({"blocks.*.mlp.hidden": 32}).resolved(model)
    assert found.ranks == {"blocks.0.mlp.hidden": 32, "blocks.1.mlp.hidden": 32}


def test_globs_that_fit_nothing():
    with pytest.raises(UserError, match=r"names 'blocks.9.\*', which fits no site"):
        compress(dense_model(), plan=RankPlan({"blocks.9.*": 8}))


def test_a_plan_file_with_globs(run_json, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"ranks": {"blocks.*.attn.qk": 4}}))
    made = run_json("compress", *MODEL, "--plan", tmp_path / "plan.json", "-o", tmp_path / "small")
    assert set(made["ranks"].values()) == {4}
    assert adacomcat.load(tmp_path / "small").rank_plan.ranks == made["ranks"]
