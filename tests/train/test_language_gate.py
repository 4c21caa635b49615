"""The language-preservation gate measures checkpoints as they lie on disk; past its bound no run finishes."""

import math
import re

import pytest
from transformers import AutoModelForCausalLM

from hovle_core.cli import main
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import HovleProcessor
from hovle_train.commands import train
from hovle_train.evaluate import perplexity
from hovle_train.language_gate import LanguageLost, judge
from hovle_train.loop import Trainer
from hovle_train.recipe_sections import LanguageConfig
from hovle_train.runs import is_finished, read_summary
from hovle_train.runtime import Runtime

TEXTS = [
    f"a {colour} thing, number {n}, is here" for n, colour in enumerate(["red", "green", "blue", "white"] * 6)
]


def gate(world, **bounds):
    return {"texts": {"things": {"path": str(world / "texts")}}, "num_texts": 24, **bounds}


def test_before_is_the_llms_and_after_the_checkpoints(make_recipe, plugins, world, tmp_path):
    """A new embedding starts from the bare LLM; a stage with a parent from the parent's checkpoint."""
    first = make_recipe("alignment", run_dir=str(tmp_path / "first"), language=gate(world))
    Trainer(first, plugins, Runtime()).run()
    processor = HovleProcessor.from_pretrained(first.path / "final")
    measured = read_summary(first.path)["language"]
    llm = AutoModelForCausalLM.from_pretrained(world / "llm", attn_implementation=first.model.attention)
    assert measured["before"]["things"] == pytest.approx(perplexity(llm, processor, TEXTS), rel=1e-4)
    final = HovleForConditionalGeneration.from_pretrained(first.path / "final")
    final.set_attn_implementation(first.model.attention)
    assert measured["after"]["things"] == pytest.approx(perplexity(final, processor, TEXTS), rel=1e-4)

    model = {"init_from": str(first.path), "backbone": None, "embedding": {}, "image": {}}
    second = make_recipe("instruction_tuning", model=model, language=gate(world))
    Trainer(second, plugins, Runtime()).run()
    assert read_summary(second.path)["language"]["before"] == pytest.approx(measured["after"], rel=1e-6)


def test_the_bare_llm_is_measured_too(make_recipe, plugins, world):
    recipe = make_recipe("language_modeling", language=gate(world, max_increase=0.0))
    Trainer(recipe, plugins, Runtime()).run()
    measured = read_summary(recipe.path)["language"]
    assert measured["after"]["things"] < measured["before"]["things"], "it trains on these texts"


def test_a_stage_past_its_bound_fails_and_can_be_accepted(make_recipe, plugins, world, capsys):
    """A learning rate that ruins the LLM costs the language, and that is said in numbers."""
    language = gate(world, max_increase=0.05)
    recipe = make_recipe("instruction_tuning", language=language, train={"steps": 3}, optim={"lr": 0.3})
    with pytest.raises(LanguageLost) as failed:
        train(recipe, local=True)
    said = str(failed.value)
    found = re.search(
        r"perplexity on 'things' went from ([\d.]+) to ([\d.]+), \+([\d.]+)%; .*allows \+5.0%", said
    )
    assert found, said
    before, after, percent = map(float, found.groups())
    assert percent == pytest.approx((after / before - 1) * 100, abs=0.5)
    assert percent > 5
    assert not is_finished(recipe.path)
    assert (recipe.path / "rejected" / "model.safetensors").is_file()
    assert main(["runs", "show", recipe.run_dir]) == 0
    shown = capsys.readouterr().out
    assert "rejected" in shown
    assert "things" in shown, "the perplexities"

    with pytest.raises(LanguageLost, match="perplexity on 'things'"):
        train(recipe, local=True)  # judged again, not trained again
    stamp = (recipe.path / "metrics.jsonl").stat().st_mtime_ns
    recipe.language.max_increase = after / before
    recipe.language.num_texts -= 1
    with pytest.raises(ValueError, match="language.texts, num_texts or max_tokens are others now"):
        train(recipe, local=True)  # what was measured is not what is asked for
    recipe.language.num_texts += 1
    train(recipe, local=True)
    assert is_finished(recipe.path)
    assert read_summary(recipe.path)["language"]["after"]["things"] == pytest.approx(after, abs=0.01)
    assert (recipe.path / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert "finished already" in capsys.readouterr().err


def test_a_finished_run_is_judged_by_the_bounds_of_now(make_recipe, plugins, world, capsys):
    recipe = make_recipe("instruction_tuning", train={"steps": 2}, language=gate(world, max_increase=100.0))
    train(recipe, local=True)
    after = read_summary(recipe.path)["language"]["after"]["things"]
    recipe.language.max_perplexity = after / 2
    with pytest.raises(
        LanguageLost, match="perplexity on 'things' .*It finished under another bound, in .*final"
    ):
        train(recipe, local=True)
    assert is_finished(recipe.path)
    recipe.language.max_perplexity = after * 2
    capsys.readouterr()
    train(recipe, local=True)
    assert "not measured" not in capsys.readouterr().err
    recipe.language.num_texts = 3
    train(recipe, local=True)
    assert "its language was not measured on these texts" in capsys.readouterr().err


def test_what_a_finished_run_was_not_asked_for_is_said(make_recipe, world, tmp_path, capsys):
    folder = str(tmp_path / "a run [b]")  # printed as it is
    train(make_recipe("alignment", run_dir=folder, train={"steps": 1}), local=True)
    later = {"run_dir": folder, "train": {"steps": 1, "storage_path": str(tmp_path / "store")}}
    train(make_recipe("alignment", language=gate(world), **later), local=True, label="second")
    said = capsys.readouterr().err
    assert "second: finished already" in said
    assert folder in said
    assert "its language was not measured on these texts" in said
    assert "nothing was copied to" in said
    assert not (tmp_path / "store").exists()


def test_texts_that_are_not_there_are_named_before_the_first_step(make_recipe, tmp_path, capsys):
    language = {"texts": {"prose": {"path": str(tmp_path / "nope")}}}
    recipe = make_recipe("alignment", language=language)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    for arguments in (["--dry-run"], ["--local"]):
        assert main(["train", str(path), *arguments]) == 2
        assert "language.texts.prose (" in capsys.readouterr().err
    assert not recipe.path.exists()


def test_measuring_changes_no_training(make_recipe, plugins, world, tmp_path):
    from safetensors.torch import load_file

    with_gate = make_recipe("alignment", run_dir=str(tmp_path / "gate"), language=gate(world))
    without = make_recipe("alignment", run_dir=str(tmp_path / "none"))
    finals = []
    for recipe in (with_gate, without):
        Trainer(recipe, plugins, Runtime()).run()
        finals.append(load_file(recipe.path / "final" / "model.safetensors"))
    assert all((finals[0][name] == finals[1][name]).all() for name in finals[0])


def test_bounds():
    def problems(after, **bounds):
        language = LanguageConfig(texts={"a": {"path": "x"}}, **bounds)
        return judge({"before": {"a": 10.0}, "after": {"a": after}}, language)

    assert problems(11.0, max_increase=0.1) == []
    assert "+12.0%; language.max_increase allows +10.0%" in problems(11.2, max_increase=0.1)[0]
    assert "language.max_perplexity is 11" in problems(11.2, max_perplexity=11.0)[0]
    assert problems(1e9) == []
    assert len(problems(math.nan, max_increase=1.0, max_perplexity=100.0)) == 2


def test_texts_that_are_no_texts_are_named(make_recipe, plugins, world):
    language = {"texts": {"chats": {"path": str(world / "chats")}}}
    with pytest.raises(ValueError, match="language.texts.chats .* holds more than plain text"):
        Trainer(make_recipe("alignment", language=language), plugins, Runtime()).run()
