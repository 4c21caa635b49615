"""The language-preservation gate: perplexity on named texts of what a stage started from and of what it leaves.

HoVLE's claim is that a model learns to see without forgetting how to read. A stage whose checkpoint is past its bound
is no finished run: the checkpoint lies in `rejected/`, and the run fails and says by how much. Measured by rank 0 on
checkpoints as they lie on disk, so that it is the released model's, however training was spread.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hovle_core.config import HolisticEmbeddingConfig, HovleConfig
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.precision import resolve_precision
from hovle_core.processor import HovleProcessor
from hovle_core.registry import Registry
from hovle_train.build import build_llm, build_processor, build_tokenizer
from hovle_train.config import Recipe
from hovle_train.evaluate import perplexity
from hovle_train.export import finish, write_json
from hovle_train.lineage import absolute, check_finished, check_made_by, checked_hash, parent_of
from hovle_train.recipe_sections import LanguageConfig, Source
from hovle_train.runs import (
    FINAL,
    FINAL_EMA,
    LANGUAGE_FILE,
    REJECTED,
    RUN_CARD,
    SUMMARY_FILE,
    is_finished,
    read_summary,
    resolve_checkpoint,
)
from hovle_train.runtime import Runtime
from hovle_train.storage import RemoteRun

Perplexities = dict[str, float]
# Of the `language` section, what perplexities depend on.
MEASURED = {"texts", "num_texts", "max_tokens"}


class LanguageLost(ValueError):
    """A stage cost the model more of its language than the recipe allows."""


class LanguageGate:
    """Measures around one stage of one run, if its recipe has a `language` section; else both methods do nothing."""

    def __init__(self, recipe: Recipe, registry: Registry, runtime: Runtime):
        self.recipe, self.registry, self.device = recipe, registry, runtime.device
        self.path = recipe.path / LANGUAGE_FILE
        self._before: Perplexities = {}

    def measure_before(self, parent_weights: str | None) -> None:
        """Perplexity of what the stage starts from: its parent HoVLE, or the bare LLM of its backbone.

        Once a run: a later start reads what an earlier one measured on the same texts of the same `parent_weights`.
        """
        language, model = self.recipe.language, self.recipe.model
        if language is None:
            return
        texts = language.model_dump(mode="json", include=MEASURED)
        of = hashlib.sha256(json.dumps([texts, parent_of(self.recipe), parent_weights]).encode()).hexdigest()
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if found.get("of") == of:
            self._before = found["before"]
            return
        if model.init_from is not None:
            self._before = self._measure(*self._load_hovle(resolve_checkpoint(model.init_from)))
        else:
            tokenizer = build_tokenizer(model, self.registry)
            processor = build_processor(model, tokenizer, HolisticEmbeddingConfig())
            self._before = self._measure(build_llm(model, self.registry, tokenizer), processor)
        write_json(self.path, {"of": of, "before": self._before})

    def measure_after(self, folder: Path) -> dict[str, Perplexities] | None:
        """Perplexities by text, `before` and `after` the stage: `folder` holds the checkpoint that it leaves."""
        if self.recipe.language is None:
            return None
        return {"before": self._before, "after": self._measure(*self._load(str(folder)))}

    def check(self, measured: dict[str, Perplexities] | None) -> None:
        """Raise LanguageLost, saying by how much, for what `measure_after` found past the recipe's bounds."""
        check(measured, self.recipe)

    def _load_hovle(self, path: str) -> tuple[PreTrainedModel, HovleProcessor]:
        model = HovleForConditionalGeneration.from_pretrained(path, dtype=self._dtype())
        return model, HovleProcessor.from_pretrained(path)

    def _load(self, path: str) -> tuple[PreTrainedModel, HovleProcessor]:
        """A finished stage's checkpoint: a HoVLE, or a bare LLM."""
        if isinstance(AutoConfig.from_pretrained(path), HovleConfig):
            return self._load_hovle(path)
        llm = AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype())
        tokenizer = AutoTokenizer.from_pretrained(path)
        return llm, build_processor(self.recipe.model, tokenizer, HolisticEmbeddingConfig())

    def _dtype(self) -> torch.dtype:
        return resolve_precision(self.recipe.train.precision, self.device)

    def _measure(self, model: PreTrainedModel, processor: HovleProcessor) -> Perplexities:
        language = self.recipe.language
        assert language is not None
        model.set_attn_implementation(self.recipe.model.attention)
        model.to(self.device)
        with torch.random.fork_rng():  # training goes on as if nothing had been measured
            return {
                name: perplexity(model, processor, self._texts(name, source, language), language.max_tokens)
                for name, source in language.texts.items()
            }

    def _texts(self, name: str, source: Source, language: LanguageConfig) -> list[str]:
        """`num_texts` of a source, evenly spread over it. Raises ValueError for a sample that is no text."""
        opened = self.registry.build("dataset", source.name, path=source.path, **source.options)
        count = min(language.num_texts, len(opened))
        samples = [opened[i * len(opened) // count] for i in range(count)]
        texts = [sample.text for sample in samples if sample.text is not None and not sample.images]
        if len(texts) < count:
            raise ValueError(
                f"language.texts.{name} ({source.path}) holds more than plain text; give samples of text"
            )
        return texts


def judge(measured: dict[str, Perplexities], language: LanguageConfig) -> list[str]:
    """What is past its bound, a sentence a text."""
    problems = []
    for name, after in measured["after"].items():
        before = measured["before"][name]
        change = f"perplexity on {name!r} went from {before:.2f} to {after:.2f}, {after / before - 1:+.1%}"
        # Written so that a perplexity that is no number is past every bound.
        if language.max_increase is not None and not after <= before * (1 + language.max_increase):
            problems.append(f"{change}; language.max_increase allows {language.max_increase:+.1%}")
        if language.max_perplexity is not None and not after <= language.max_perplexity:
            problems.append(f"{change}; language.max_perplexity is {language.max_perplexity}")
    return problems


def check(measured: dict[str, Perplexities] | None, recipe: Recipe) -> None:
    """Raise LanguageLost, saying by how much, for perplexities past the recipe's bounds."""
    if measured is None or recipe.language is None:
        return
    if problems := judge(measured, recipe.language):
        raise LanguageLost(
            f"{recipe.stage.name} cost the model its language: {'; '.join(problems)}. The checkpoint is in "
            f"{recipe.path / REJECTED}: to accept it, raise the bound and run again; to train it otherwise, delete "
            f"{recipe.run_dir}"
        )


def judge_finished(recipe: Recipe) -> bool:
    """Judge a finished run by the recipe's bounds as they are now, which may be tighter than those it finished under.

    Returns whether there was anything to judge: false for a run without perplexities of the texts that are named now.
    Raises LanguageLost.
    """
    language, card = recipe.language, read_summary(recipe.path)
    measured = card.get("language")
    if language is None:
        return True
    if measured is None or _texts_of(recipe) != _texts_of(Recipe.model_validate(card["recipe"])):
        return False
    if problems := judge(measured, language):
        raise LanguageLost(
            f"{recipe.stage.name} cost the model its language: {'; '.join(problems)}. It finished under another bound, "
            f"in {recipe.path / FINAL}: raise the bound, or delete {recipe.run_dir} to train it otherwise"
        )
    return True


def _texts_of(recipe: Recipe) -> dict[str, Any] | None:
    """What perplexities are of, whatever the folder that a recipe is read in."""
    language = absolute(recipe).language
    return None if language is None else language.model_dump(mode="json", include=MEASURED)


def reconsider(recipe: Recipe) -> None:
    """Judge a rejected checkpoint by the recipe's bounds as they are now: it becomes the finished run, or LanguageLost
    is raised once more. Does nothing where none was rejected, except that a finished run that was to be copied is, if a
    failure or its rejection kept it from that."""
    rejected = recipe.path / REJECTED
    if not is_finished(recipe.path):
        if not (rejected / RUN_CARD).is_file():
            return
        card = json.loads((rejected / RUN_CARD).read_text())
        parent = checked_hash(parent_of(recipe))
        check_made_by(card, recipe, parent, None, f"rejected checkpoint {rejected}")
        measured = Recipe.model_validate(card["recipe"])
        if recipe.language is not None and _texts_of(recipe) != _texts_of(measured):
            raise ValueError(
                f"language.texts, num_texts or max_tokens are others now than {rejected} was measured on: restore "
                f"them, or delete {recipe.run_dir} to train it again"
            )
        check(card["language"], recipe)
        write_json(recipe.path / SUMMARY_FILE, card)
        finish(rejected, rejected / FINAL_EMA, recipe.path)
    if recipe.train.storage_path:
        check_finished(recipe)
        if read_summary(recipe.path)["recipe"]["train"].get("storage_path"):
            RemoteRun(recipe.train.storage_path).push_final(recipe.path)
