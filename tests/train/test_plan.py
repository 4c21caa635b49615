"""Plans against what really happens: torch's FLOP counter on real steps, tensors that exist, memory of this process."""

import ctypes
import json

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hovle_core.cli import main
from hovle_core.losses import next_token_loss
from hovle_core.testing import tiny_hovle, tiny_llm, tiny_processor, tiny_tokenizer
from hovle_data.packing import pack
from hovle_data.quarantine import Ledger
from hovle_data.sections import read_yaml
from hovle_train import cost, plan
from hovle_train.commands import dry_run
from hovle_train.cost import Row, row_cost
from hovle_train.loop import Trainer
from hovle_train.recipe_file import load_recipe, parse_recipe
from hovle_train.recipe_sections import TeacherPoolConfig
from hovle_train.runtime import Runtime

ASSUMED = plan.Assumptions(tiles=1, text_tokens=12, target_share=1.0, mfu=0.4)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_key_value_heads": 4}
    model = tiny_llm(len(tokenizer), tie_word_embeddings=False, max_position_embeddings=32_000, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepared(make_recipe, plugins, llm, stage, options=None, **sections):
    embedding = {"num_hidden_layers": 2, "image_size": 56} if stage != "language_modeling" else {}
    model = {
        "backbone": {"name": "transformers", "options": {"path": str(llm)}},
        "embedding": embedding,
        **sections.pop("model", {}),
    }
    trainer = Trainer(make_recipe(stage, options, model=model, **sections), plugins, Runtime())
    trainer.prepare()
    return trainer


def one_sample(trainer):
    stream = trainer.stage.stream(trainer.processor, Ledger())
    (batch,) = pack([stream.get(0)], 4096, 64)
    return batch


LORA = {"lora": {"r": 4}}  # on the LLM, whose own weights are frozen then
LORA_ALONE = {"r": 8, "dropout": 0.1, "freeze": ["embedding.", "language_model."]}
LORA_ON_ONE_LAYER = {"lora": {**LORA_ALONE, "target_modules": r".*language_model\.model\.layers\.1\..*_proj"}}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stage", "options", "embedding", "wrappers"),
    [
        ("language_modeling", None, {}, {}),
        ("distillation", None, {}, {}),
        ("distillation", {"teacher": {"name": "grid"}, "head": "mlp", "blocks": {1: 1, 2: 1}}, {}, {}),
        ("alignment", None, {}, {}),
        ("alignment", None, {"pixel_shuffle_loc": "post"}, {}),
        ("instruction_tuning", None, {}, {}),
        ("instruction_tuning", None, {}, LORA),
        ("instruction_tuning", None, {}, LORA_ON_ONE_LAYER),
    ],
)
def test_operations_are_those_that_torch_counts(
    stage, options, embedding, wrappers, checkpointing, make_recipe, plugins, llm, monkeypatch
):
    """A step of one sample with plain attention, which computes what causality hides as well."""
    fields = {"num_hidden_layers": 2, "image_size": 56, **embedding} if stage != "language_modeling" else {}
    model = {"attention": "eager", "activation_checkpointing": checkpointing, "embedding": fields}
    model["wrappers"] = wrappers
    trainer = prepared(make_recipe, plugins, llm, stage, options, model=model)
    batch = one_sample(trainer)
    with FlopCounterMode(display=False) as counter:
        loss, _ = trainer.stage.loss(trainer.module, batch, trainer.count_targets([batch]))
        loss.backward()
    monkeypatch.setattr(cost, "CAUSAL_SHARE", 1.0)
    stage = plugins.registry.build("stage", stage, recipe=trainer.recipe, registry=plugins.registry)
    length = batch.num_tokens
    targets = int((batch.labels != -100).sum())
    row = Row(length, length, batch.num_tiles, targets)
    counted = row_cost(plan.meta_module(stage, plugins), row, torch.float32, checkpointing)
    assert counted.operations == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("stage", "optim", "wrappers"),
    [
        ("language_modeling", {}, {}),
        ("distillation", {"name": "muon"}, {}),
        ("alignment", {"ema": {"decay": 0.9}}, {}),
        ("instruction_tuning", {"name": "muon"}, {}),
        ("instruction_tuning", {}, LORA),
        ("instruction_tuning", {}, {"lora": LORA_ALONE}),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_states_are_as_large_as_the_tensors_that_are_there(
    stage, optim, wrappers, precision, make_recipe, plugins, llm
):
    sections = {"train": {"precision": precision}, "optim": optim, "model": {"wrappers": wrappers}}
    trainer = prepared(make_recipe, plugins, llm, stage, **sections)
    given = []
    trainer.optimizers[0].register_step_pre_hook(
        lambda *_: given.append(sum(p.grad.nbytes for p in trainer.weights if p.grad is not None))
    )
    trainer.step(0, trainer.loader(Ledger()).batches(0))
    planned = plan.plan_stage(trainer.recipe, plugins, "1xH100", ASSUMED)
    own = {p.data_ptr(): p.nbytes for p in (*trainer.module.parameters(), *trainer.weights)}
    assert planned.memory["weights"] == pytest.approx(sum(own.values()), rel=0.1)
    low = sum(p.numel() * 2 for p in trainer.weights) if precision == "bfloat16" else 0
    assert planned.memory["gradients"] == pytest.approx(given[0] + low, rel=0.1)
    state = [t for o in trainer.remembering for s in o.state.values() for t in s.values()]
    assert planned.memory["optimizer"] == pytest.approx(sum(t.nbytes for t in state), rel=0.1)
    assert planned.parameters == sum(p.numel() for p in trainer.module.parameters())
    assert planned.trainable == sum(p.numel() for p in trainer.weights)


@pytest.mark.parametrize(
    ("checkpointing", "wrappers"),
    [
        (False, {}),
        pytest.param(True, {}, marks=pytest.mark.slow),
        pytest.param(False, LORA, marks=pytest.mark.slow),
    ],
)
def test_activations_take_what_this_process_grows_by(checkpointing, wrappers, make_recipe, plugins, llm):
    """The graph of one long sample, held: resident memory before and after the forward pass."""
    model = {"attention": "sdpa", "activation_checkpointing": checkpointing, "wrappers": wrappers}
    trainer = prepared(make_recipe, plugins, llm, "instruction_tuning", model=model)
    batch = one_sample(trainer)
    length = 24_000 if checkpointing else 8_000
    tile = batch.input_ids[0] == trainer.processor.image_token_id
    ids = torch.full((1, length), 5)
    ids[0, : len(tile)] = batch.input_ids[0]
    labels = torch.full((1, length), -100)
    labels[0, -100:] = 5
    inputs = {"input_ids": ids, "position_ids": torch.arange(length)[None]}
    inputs["pixel_values"] = trainer.processor.image_processor.normalize(batch.pixel_values)
    next_token_loss(trainer.module, inputs, labels).backward()
    libc, process = ctypes.CDLL(None), psutil.Process()
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    libc.malloc_trim(0)
    before = process.memory_info().rss
    loss = next_token_loss(trainer.module, inputs, labels)
    libc.malloc_trim(0)
    grown = process.memory_info().rss - before
    assert loss.requires_grad
    stage = plugins.registry.build(
        "stage", "instruction_tuning", recipe=trainer.recipe, registry=plugins.registry
    )
    counted = row_cost(
        plan.meta_module(stage, plugins),
        Row(length, length, batch.num_tiles, 100),
        torch.float32,
        checkpointing,
    )
    assert counted.saved == pytest.approx(grown, rel=0.1)


STAGES = ("distillation", "alignment", "instruction_tuning")
NAMES = [f"{model}/{stage}" for model in ("hovle-2.6b", "hovle-10b") for stage in STAGES]


def test_packaged_recipes_are_planned_without_a_download(capsys):
    """The released 2,606,327,808, less the unused class embedding of 2,048 (a buffer here) and nine rows of three
    tables (its picture tokens)."""
    assert main(["plan", *NAMES, "--gpus", "8xH100", "--tiles", "6", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    small, large = stages[:3], stages[3:]
    assert all(stage["fits"] for stage in stages)
    assert main(["plan", "hovle-2.6b/pipeline", "--set", "run_dir=x", "--tiles", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == small
    assert {s["parameters"] for s in small[1:]} == {2_606_325_760 - 9 * 3 * 2048}
    assert small[0]["parameters"] > small[1]["parameters"], "and the head"
    assert large[1]["parameters"] == pytest.approx(9.9e9, rel=0.02)
    # 6 operations a weight and token, at least; all of them train, but for the table that nothing reads.
    tokens = small[2]["tokens_per_step"]
    assert 1 < small[2]["operations"] / (6 * tokens * 2.2e9) < 2.2
    assert small[0]["trainable"] < 0.8e9 < small[2]["trainable"]
    hours = [s["hours"] for s in stages]
    assert all(a < b for a, b in zip(hours[:3], hours[3:], strict=True))


def test_sharding_divides_what_is_kept(plugins):
    recipe = load_recipe("hovle-2.6b/distillation", registry=plugins.registry)
    alone, shared = (
        plan.plan_stage(recipe, plugins, "8xH100", ASSUMED, sharded=sharded) for sharded in (False, True)
    )
    assert shared.memory["optimizer"] == pytest.approx(alone.memory["optimizer"] / 8)
    assert shared.memory["activations"] == alone.memory["activations"]


def test_what_else_lies_in_a_recipe_s_folder_is_no_matter(make_recipe, tmp_path, capsys):
    recipe = make_recipe("alignment", run_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "chart.yaml").write_text("{{- if .Values.on }}\nkind: Job\n{{ end }}")
    (tmp_path / "old.yaml").write_text(recipe.to_yaml() + "\nformer_key: 1\n")
    little = ["--gpus", "1xH100", "--tiles", "1", "--text-tokens", "16"]
    assert main(["plan", str(tmp_path / "recipe.yaml"), *little]) == 0
    assert "GiB" in capsys.readouterr().out


def test_teachers_on_nodes_of_their_own_are_not_on_the_training_gpus(plugins):
    recipe = load_recipe("hovle-2.6b/distillation", registry=plugins.registry)
    pooled = recipe.model_copy(deep=True)
    pooled.resources.teacher_pool = TeacherPoolConfig(gpus=1)
    own, other = (plan.plan_stage(r, plugins, "8xH100", ASSUMED) for r in (recipe, pooled))
    assert other.memory["weights"] < own.memory["weights"]
    assert other.operations < own.operations
    assert other.parameters == own.parameters


def test_the_command_says_what_it_assumed_and_what_does_not_fit(capsys):
    arguments = ["hovle-10b/instruction_tuning", "--gpus", "1xRTX4090", "--tiles", "6"]
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert "6 tiles and 128 text tokens a sample" in out
    assert "does not fit" in out
    for more, message in (
        (["--gpus", "8xH900"], "--gpus '8xH900' must read 8xH100"),
        (["--mfu", "2"], "--mfu 2 must be within"),
        (["--tiles", "60"], "longer than train.micro_batch_tokens"),
    ):
        assert main(["plan", "hovle-2.6b/alignment", *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", NAMES)
def test_packaged_recipes_print(name, capsys):
    assert main(["train", name, "--print-config"]) == 0
    assert parse_recipe(read_yaml(capsys.readouterr().out)).run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_packaged_recipes_run_dry_on_small_things(name, world, tmp_path, plugins, capsys):
    """Everything of them but the weights and the data, which no test has: a tiny model and shards stand in."""
    embedding = {"num_hidden_layers": 2, "image_size": 56}
    overrides = ["train.global_batch_size=4"]
    if name.endswith("distillation"):
        backbone = {"name": "transformers", "options": {"path": str(world / "llm")}}
        overrides += [f"model.backbone={json.dumps(backbone)}", f"model.embedding={json.dumps(embedding)}"]
        overrides += ["stage.options.teacher.name=grid", f"data.images.0.path={world / 'images'}"]
        overrides += [f"data.texts.0.path={world / 'texts'}"]
    else:
        tokenizer = tiny_tokenizer()
        tiny_hovle(tokenizer).save_pretrained(tmp_path)
        tiny_processor(tokenizer).save_pretrained(tmp_path)
        shards = "pairs" if name.endswith("alignment") else "chats"
        overrides += [f"model.init_from={tmp_path}", f"data.sources.0.path={world / shards}"]
    dry_run(load_recipe(name, overrides, plugins.registry), plugins)
    assert "of 4 samples" in capsys.readouterr().out


def test_an_architecture_that_cannot_be_counted_is_named(make_recipe, plugins, llm, tmp_path):
    from transformers import GPT2Config, MixtralConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    mixtral = MixtralConfig(vocab_size=64, intermediate_size=64, num_key_value_heads=2, **sizes)
    for config in (mixtral, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)):
        config.save_pretrained(tmp_path)
        model = {
            "backbone": {"name": "transformers", "options": {"path": str(tmp_path)}},
            "embedding": {
                "num_hidden_layers": 2, "image_size": 56, "num_attention_heads": 4, "num_key_value_heads": 4,
            },
        }  # fmt: skip
        with pytest.raises(ValueError, match=f"cannot count {config.model_type}: ") as raised:
            plan.plan_stage(make_recipe("alignment", model=model), plugins, "1xH100", ASSUMED)
        assert "\n" not in str(raised.value)


def test_a_wrapper_that_reads_weights_is_named(make_recipe, plugins, monkeypatch):
    def reads(plugins, module, wrappers):
        next(module.parameters()).sum().item()

    monkeypatch.setattr(plan, "wrap_model", reads)
    recipe = make_recipe("alignment", model={"wrappers": {"lora": {"r": 4}}})
    with pytest.raises(ValueError, match=r"model.wrappers lora: made for a model with weights.*--set 'model"):
        plan.plan_stage(recipe, plugins, "1xH100", ASSUMED)
